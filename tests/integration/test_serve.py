"""vLLM serves what `axolotl spin export` writes of a run with adapters, merged or not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished
from tiny import LORA, spin_config, write_config

from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.shards import Shards
from spin_plugin.opponent.weights import fingerprint
from spin_plugin.run.directory import RunDir

pytestmark = pytest.mark.slow


def test_adapter_and_merged_model_answer_alike(
    tmp_path: Path,
    llama: Path,
    chat_data: Path,
    vllm_python: Path,
    command: Callable[..., Finished],
    run_jobs: Callable[..., None],
) -> None:
    config = spin_config(tmp_path, llama, chat_data, **LORA)
    config["spin"]["iterations"] = 1
    run_jobs((write_config(tmp_path, config), 1))
    card = (RunDir(tmp_path / "run").iteration(0).path / "README.md").read_text()
    assert "library_name: peft" in card
    assert str(tmp_path) not in card
    exported = {name: tmp_path / name for name in ("adapter", "merged")}
    for name, target in exported.items():
        options = ["--iteration", "last", *(["--merge"] if name == "merged" else [])]
        done = command("axolotl", "spin", "export", tmp_path / "config.yml", target, *options, directory=tmp_path)
        assert done.code == 0, done.output
    requests = [Request(n, "train", n, [257, *(10 + int(digit) for digit in f"{n:03d}")], 24, n) for n in range(32)]
    served = {
        "adapter": (llama, str(exported["adapter"])),
        "merged": (exported["merged"], None),
        "base": (llama, None),
    }
    generated = {}
    for name, (model, lora) in served.items():
        engine = {"model": str(model), "dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 64 << 20}
        sampling = {"temperature": 0.0, "top_p": 1.0, "stop_token_ids": [258]}
        weights = fingerprint(filter(None, (str(model), lora)), None)
        job = Job(0, engine | {"generation_config": "vllm"}, lora, weights, sampling, len(requests), name)
        shards = Shards(tmp_path / f"generated-{name}")
        generate(job, shards, lambda: requests, lambda: vllm_python)
        generated[name] = [response["tokens"] for response in shards.responses()]
    assert generated["adapter"] == generated["merged"] != generated["base"]
