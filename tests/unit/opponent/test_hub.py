"""A base model on the hub is pinned to a commit, which the entire iteration uses.

The tests write a hub cache in its real layout, where transformers, Axolotl and vLLM find the model.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import Finished
from safetensors.torch import load_file
from tiny import make_model, spin_config, write_config
from transformers import AutoModelForCausalLM

from spin_plugin.console import SpinError
from spin_plugin.generation import dispatcher
from spin_plugin.opponent.hub import bytes_of_weights, commit_of, pin

NAME = "org/tiny"
OLD, NEW = "a" * 40, "b" * 40


class Cache:
    """A huggingface_hub cache directory with one model."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repo = home / "hub" / "models--org--tiny"

    def add(self, commit: str, model: Path) -> None:
        """Add a snapshot, whose files are links to blobs."""
        snapshot = self.repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (self.repo / "blobs").mkdir(exist_ok=True)
        for file in model.iterdir():
            blob = self.repo / "blobs" / f"{commit}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")

    def move(self, branch: str, commit: str) -> None:
        (self.repo / "refs").mkdir(exist_ok=True)
        (self.repo / "refs" / branch).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Two commits; the main branch points to the old one."""
    cache = Cache(tmp_path / "home")
    cache.add(OLD, llama)
    cache.add(NEW, make_model(tmp_path / "newer", seed=1))
    cache.move("main", OLD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache.home / "hub"))
    monkeypatch.setenv("HF_HOME", str(cache.home))  # for other processes
    return cache


def test_branch_tag_and_commit_resolve_to_a_commit(cache: Cache) -> None:
    assert commit_of(NAME, None) == OLD
    cache.move("main", NEW)
    cache.move("v1", OLD)
    assert (commit_of(NAME, None), commit_of(NAME, "v1"), commit_of(NAME, OLD)) == (NEW, OLD, OLD)


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), (NAME, "v2")])
def test_unknown_model_or_revision_is_refused(cache: Cache, name: str, revision: str | None) -> None:
    with pytest.raises(SpinError, match=f"base_model: {name} is neither a directory"):
        commit_of(name, revision)


def test_size_of_weights_matches_the_files(cache: Cache, llama: Path, tmp_path: Path) -> None:
    assert bytes_of_weights(NAME, OLD) == (llama / "model.safetensors").stat().st_size
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    cache.add("c" * 40, tmp_path / "parts")
    parts = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 3
    size = sum(file.stat().st_size for file in parts)
    assert 0.95 * size < bytes_of_weights(NAME, "c" * 40) <= size  # the index counts tensors without their headers
    assert bytes_of_weights("org/other", None) == 0


@pytest.mark.parametrize(("tokenizer", "pinned"), [(NAME, True), (None, True), ("local", True), ("org/else", False)])
def test_training_is_pinned_unless_the_tokenizer_comes_from_elsewhere(
    tmp_path: Path, tokenizer: str | None, pinned: bool
) -> None:
    place = str(tmp_path) if tokenizer == "local" else tokenizer
    cfg = DictDefault({"base_model": NAME, "tokenizer_config": place})
    pin(cfg, None)
    assert cfg.revision_of_model is None
    pin(cfg, OLD)
    assert cfg.revision_of_model == (OLD if pinned else None)


# --- a branch that moves -----------------------------------------------------------------------

WORKER = """
import json, sys
job = json.load(open(sys.argv[1]))
out = open(int(sys.argv[2]), "w", buffering=1)
def send(**content):
    out.write(json.dumps(content) + "\\n")
send(vllm=job["engine"]["revision"])
send(ready=True, slots=1000)
for path in sys.stdin:
    for line in open(path.strip()):
        request = json.loads(line)
        send(number=request["number"], tokens=[65, 261], finish="stop", stop=261)
"""


@pytest.fixture
def preprocess(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[Path], list[str]]]:
    """Run `axolotl preprocess` in this process with a tiny worker in place of vLLM's; returns the `spin:` lines."""
    from axolotl.cli.preprocess import do_cli
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.tee import close_debug_log

    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(dispatcher, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(sys, "argv", ["axolotl"])

    def run(config: Path) -> list[str]:
        PluginManager._instance = None
        do_cli(config=str(config))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("spin: ")]

    yield run
    close_debug_log()
    PluginManager._instance = None


def test_responses_are_set_aside_when_the_branch_moves(
    cache: Cache, tmp_path: Path, chat_data: Path, vllm_python: Path, preprocess: Callable[[Path], list[str]]
) -> None:
    config = write_config(tmp_path, spin_config(tmp_path, Path(NAME), chat_data))
    directory = tmp_path / "run/iteration-0"

    def job() -> dict[str, str]:
        return json.loads((directory / "synthetic/job.json").read_text())

    assert not any(".replaced-" in line for line in preprocess(config))
    assert (job()["revision"], job()["vllm"], job()["engine"]["revision"]) == (OLD, OLD, OLD)
    assert f"revision_of_model: {OLD}" in (directory / "config.yml").read_text()
    shard = directory / "synthetic/shard-00000.jsonl"
    before = shard.stat().st_mtime_ns
    assert not any("generating responses" in line for line in preprocess(config))
    assert shard.stat().st_mtime_ns == before

    for name in ("checkpoint-3", "checkpoint-6"):
        (directory / name).mkdir()
    (directory / "pairs/opponent-train.safetensors").write_bytes(b"")
    cache.move("main", NEW)
    responses, pairs = [line for line in preprocess(config) if ".replaced-" in line]
    assert "on the hub from commit aaaaaaaaaa to bbbbbbbbbb" in responses
    assert str(directory / ".replaced-synthetic") in responses
    assert "this changed: the responses" in pairs
    assert str(directory / ".replaced-checkpoint-6") in pairs
    assert (job()["revision"], job()["vllm"]) == (NEW, NEW)
    names = {path.name for path in directory.iterdir() if "replaced" in path.name or "checkpoint" in path.name}
    assert names == {".replaced-synthetic", ".replaced-pairs", ".replaced-checkpoint-6"}
    assert not any(".replaced-" in line for line in preprocess(config))


@pytest.mark.slow
def test_vllm_and_training_keep_the_commit_when_the_branch_moves(
    cache: Cache, tmp_path: Path, llama: Path, chat_data: Path, command: Callable[..., Finished], vllm_python: Path
) -> None:
    """An adapter over two iterations keeps the base model it was first trained on."""
    from tiny import LORA

    spin = {"iterations": 2, "generation": {"vllm_kwargs": {"kv_cache_memory_bytes": 64 << 20}}}
    spin["generation"]["max_tokens"] = 12
    write_config(tmp_path, spin_config(tmp_path, Path(NAME), chat_data, spin=spin, **LORA))
    for number in range(2):
        done = command("axolotl", "train", "config.yml", "--launcher", "python", directory=tmp_path)
        assert done.code == 0, done.output[-3000:]
        directory = tmp_path / f"run/iteration-{number}"
        job = json.loads((directory / "synthetic/job.json").read_text())
        assert (job["revision"], job["engine"]["revision"]) == (OLD, OLD)
        # the agreement check passes only if both loaded the same commit: the two models differ a lot
        assert "nats" in done.output
        cache.move("main", NEW)
    tensors = load_file(tmp_path / "run/iteration-1/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
