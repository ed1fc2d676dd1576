"""The run directory: atomic writes, the lock, run.json, and the keys that may change within a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from spin_plugin.config.identity import differing_keys
from spin_plugin.config.plain import without_secrets
from spin_plugin.console import SpinError
from spin_plugin.run.atomic import set_aside, write_atomically, write_dir_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.state import FORMAT, RunState


def content(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


# --- atomic writes -----------------------------------------------------------------------------


def test_file_is_written_and_replaced(tmp_path: Path) -> None:
    write_atomically(tmp_path / "run.json", "old")
    write_atomically(tmp_path / "run.json", "new: ü\n")
    assert content(tmp_path) == {"run.json": "new: ü\n"}


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A lone surrogate cannot be encoded, so the write fails midway."""
    write_atomically(tmp_path / "run.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "run.json", "x" * 100_000 + "\ud800")
    assert (tmp_path / "run.json").read_text() == "old"
    write_atomically(tmp_path / "run.json", "new")
    assert content(tmp_path) == {"run.json": "new"}


def test_reader_sees_either_the_old_or_the_new_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "run.json", "old")
    with open(tmp_path / "run.json") as reader:
        write_atomically(tmp_path / "run.json", "new")
        assert reader.read() == "old"


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        assert not (tmp_path / "pairs").exists()
        (directory / "train.arrow").write_text("1")
        (directory / "deep").mkdir()
        (directory / "deep" / "stats.json").write_text("2")

    write_dir_atomically(tmp_path / "pairs", fill)
    assert content(tmp_path) == {"pairs/train.arrow": "1", "pairs/deep/stats.json": "2"}


@pytest.mark.parametrize("there_before", [True, False])
def test_failed_fill_leaves_the_directory_unchanged(tmp_path: Path, there_before: bool) -> None:
    if there_before:
        write_dir_atomically(tmp_path / "pairs", lambda directory: (directory / "a").write_text("old") and None)

    def fail(directory: Path) -> None:
        (directory / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dir_atomically(tmp_path / "pairs", fail)
    assert (tmp_path / "pairs").exists() == there_before
    if there_before:
        assert content(tmp_path / "pairs") == {"a": "old"}

    write_dir_atomically(tmp_path / "pairs", lambda directory: (directory / "b").write_text("new") and None)
    assert content(tmp_path) == {"pairs/b": "new"}, "leftovers of the failed attempt"


# --- set aside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_before", ["rename", "never"])
def test_directory_is_in_place_or_set_aside_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    """Setting aside only renames, so it works on a full disk."""
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if source == directory and killed_before == "rename":
            raise KeyboardInterrupt
        rename(source, target)

    directory = tmp_path / "synthetic"
    for version in ("first", "second"):
        directory.mkdir()
        (directory / "shard").write_text(version)
        if version == "first":
            set_aside(directory)
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(os, "rename", killed)
        set_aside(directory)
    name = "synthetic" if killed_before == "rename" else ".replaced-synthetic"
    assert content(tmp_path) == {f"{name}/shard": "second"}
    if killed_before == "rename":
        set_aside(directory)
        assert content(tmp_path) == {".replaced-synthetic/shard": "second"}


def test_newest_checkpoint_is_set_aside_and_ignored(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    directory = run.iteration(0)
    for steps in ((9, 10), (3, 20)):
        for step in steps:
            (directory.path / f"checkpoint-{step}").mkdir(parents=True)
        aside = directory.set_checkpoints_aside()
        assert aside == directory.path / f".replaced-checkpoint-{steps[1]}"
        assert [path.name for path in directory.path.iterdir()] == [aside.name]
        assert directory.checkpoints() == []
    assert directory.set_checkpoints_aside() is None
    assert aside.exists()
    (directory.path / ".replaced-synthetic").mkdir()
    (directory.path / ".replaced-synthetic" / "shard-00000.jsonl").write_text("")
    (directory.path / "model.safetensors").write_text("")
    assert not run.holds_responses()
    assert run.started() == [0]
    run.link_newest(0)
    assert [path.name for path in run.root.iterdir() if path.is_symlink()] == ["model.safetensors"]
    with run.locked():
        assert aside.exists()
    run.reset(0)
    assert not directory.path.exists()


# --- run.json ----------------------------------------------------------------------------------


def test_directory_without_a_run_has_no_state(tmp_path: Path) -> None:
    assert RunDir(tmp_path).read_state() is None
    assert RunDir(tmp_path / "absent").finished() == 0


def test_state_round_trip(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    state = RunState({"rl": "spin", "spin": {"beta": 0.1}}, [{"iteration": 0}, {"iteration": 1}], "0.1.0")
    run.write_state(state)
    assert run.read_state() == state
    assert run.finished() == 2


GOOD = {"format": FORMAT, "version": "0.1.0", "config": {}, "finished": []}


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"{", b"\0" * 40, b"[]", b"5", b"null", b'"run"', b"{}", b"\xff\xfe\x80",
        json.dumps(GOOD).encode()[:-1],
        json.dumps(GOOD | {"finished": 3}).encode(),
        json.dumps(GOOD | {"config": None}).encode(),
        json.dumps({"format": FORMAT, "config": {}}).encode(),
    ],
)  # fmt: skip
def test_damaged_state_is_refused_in_one_line(tmp_path: Path, damaged: bytes) -> None:
    run = RunDir(tmp_path)
    run.state_file.write_bytes(damaged)
    with pytest.raises(SpinError, match=r"run\.json is damaged") as caught:
        run.finished()
    assert "\n" not in str(caught.value)
    assert run.state_file.read_bytes() == damaged


def test_state_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.state_file.write_text(json.dumps(GOOD | {"format": FORMAT + 1, "version": "9.1"}))
    with pytest.raises(SpinError, match=r"written by another version of spin-plugin \(9\.1\)") as caught:
        run.read_state()
    assert "\n" not in str(caught.value)


def test_state_of_another_version_with_the_same_format_is_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_state(RunState({"spin": {}}, [{"iteration": 0}], "99.1"))
    stored = json.loads(run.state_file.read_text())
    run.state_file.write_text(json.dumps(stored | {"a_key_of_a_later_version": 1}))
    assert run.finished() == 1


# --- one run at a time -------------------------------------------------------------------------

HOLD = """
import sys
import time
from pathlib import Path
from spin_plugin.run.directory import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process_holds(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Run another process inside `locked()`; kill it on exit."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_second_run_is_refused_and_names_the_lock_owner(tmp_path: Path) -> None:
    with other_process_holds(tmp_path) as holder:
        with (
            pytest.raises(SpinError, match=re.escape(f"{tmp_path} is in use by process {holder.pid} on ")) as caught,
            RunDir(tmp_path).locked(),
        ):
            pytest.fail("two processes are in the directory")
        assert "\n" not in str(caught.value)


def test_lock_is_released_when_its_owner_is_killed(tmp_path: Path) -> None:
    with other_process_holds(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert (tmp_path / "run.lock.json").exists(), "a killed process cannot clean up"
        with RunDir(tmp_path).locked():
            assert json.loads((tmp_path / "run.lock.json").read_text())["pid"] == os.getpid()


def test_only_one_of_simultaneous_runs_gets_the_lock(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    while sum(racer.poll() is None for racer in racers) > 1:  # the lock owner waits on stdin
        time.sleep(0.05)
    holding = [racer for racer in racers if racer.poll() is None]
    refused = [racer.communicate()[1] for racer in racers if racer.poll() is not None]
    assert len(holding) == 1
    assert all(f"is in use by process {holding[0].pid} on " in error for error in refused), refused
    assert holding[0].communicate("")[0] == "held\n"


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new" / "run")
    for _ in range(2):
        with pytest.raises(SpinError, match="inside"), run.locked():
            raise SpinError("inside")
    assert not (run.root / "run.lock.json").exists()


# --- what may change within a run --------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "base_model": "org/model",
    "learning_rate": 5e-7,
    "datasets": [{"path": "org/data", "type": "chat_template"}],
    "special_tokens": {"pad_token": "<pad>"},
    "tokenizer_config": "org/tokenizer",
    "output_dir": "out",
    "logging_steps": 1,
    "vllm": {"gpu_memory_utilization": 0.9, "enforce_eager": True},
    "spin": {
        "iterations": 4,
        "beta": 0.1,
        "schedule": [{}, {}, {}, {}],
        "generation": {"temperature": 1.0, "vllm_kwargs": {"block_size": 16}},
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return CONFIG with `value` at a dotted path."""
    config = json.loads(json.dumps(CONFIG))
    place = config
    *parents, last = path.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return config


def stored(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as read back from run.json."""
    return json.loads(json.dumps(without_secrets(config)))


def test_same_configuration_has_no_differing_keys() -> None:
    assert differing_keys(stored(CONFIG), without_secrets(CONFIG), 1) == []


@pytest.mark.parametrize(
    "path",
    [
        "logging_steps", "save_steps", "saves_per_epoch", "save_total_limit", "eval_steps", "evals_per_epoch",
        "wandb_project", "wandb_mode", "wandb_name", "use_wandb", "mlflow_tracking_uri", "use_tensorboard",
        "hub_model_id", "output_dir", "deepspeed", "fsdp_config", "gradient_checkpointing",
        "dataset_prepared_path", "dataloader_num_workers", "ddp_timeout",
        "resume_from_checkpoint", "debug_num_examples", "shard", "download", "iterable",
        "spin.stop", "spin.keep",
        "spin.iterations", "spin.generation.vllm_python", "vllm.gpu_memory_utilization", "vllm.host",
        "vllm.tensor_parallel_size", "vllm.data_parallel_size", "spin.generation.vllm_kwargs.max_num_seqs",
    ],
)  # fmt: skip
def test_key_that_does_not_affect_the_result_may_change(path: str) -> None:
    assert differing_keys(stored(CONFIG), without_secrets(changed(path, 77)), 1) == []


@pytest.mark.parametrize(
    "path",
    [
        "base_model", "learning_rate", "datasets", "seed",
        "num_epochs", "optimizer", "chat_template", "sequence_len", "adapter", "lora_r", "load_in_4bit",
        "load_in_8bit", "val_set_size", "spin.beta", "spin.loss_type", "spin.turns", "spin.num_prompts",
        "spin.held_out", "spin.history_iterations", "vllm.dtype", "spin.generation.vllm_kwargs.quantization",
        "spin.equal_pairs", "spin.generation.temperature", "spin.generation.top_p", "spin.generation.max_tokens",
        "spin.generation.num_generations", "spin.generation.seed", "vllm.max_model_len",
        "spin.space_mu", "spin.t_spin_weight", "spin.real_penalty", "spin.sft_weight",
    ],
)  # fmt: skip
def test_key_that_affects_the_result_is_named(path: str) -> None:
    assert differing_keys(stored(CONFIG), without_secrets(changed(path, 77)), 1) == [path]


def test_step_may_be_split_into_smaller_micro_batches_but_not_grow() -> None:
    """After running out of memory in training, the user keeps the responses."""
    before = CONFIG | {"micro_batch_size": 8, "gradient_accumulation_steps": 2}
    assert differing_keys(before, CONFIG | {"micro_batch_size": 2, "gradient_accumulation_steps": 8}, 1) == []
    grown = CONFIG | {"micro_batch_size": 8, "gradient_accumulation_steps": 4}
    assert differing_keys(before, grown, 1) == ["micro_batch_size × gradient_accumulation_steps"]


@pytest.mark.parametrize("key", ["tokenizer_config", "tokenizer_type", "special_tokens.pad_token"])
def test_tokenizer_keys_are_not_secret_and_may_not_change(key: str) -> None:
    """Their names contain `token`, like those of real secrets."""
    assert differing_keys(stored(CONFIG), without_secrets(changed(key, "other")), 1) == [key.partition(".")[0]]


def test_removed_key_is_named_and_a_key_set_to_none_is_not() -> None:
    without = {key: value for key, value in CONFIG.items() if key != "learning_rate"}
    assert differing_keys(CONFIG, without, 1) == ["learning_rate"]
    assert differing_keys(CONFIG, CONFIG | {"warmup_steps": None}, 1) == []


def scheduled(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"spin": {"iterations": max(1, len(entries)), "schedule": list(entries)}}


@pytest.mark.parametrize("finished", [1, 2])
def test_schedule_may_grow_with_the_iterations(finished: int) -> None:
    """Before and after the last iteration is finished."""
    before = scheduled({"beta": 0.1}, {"beta": 0.2})
    assert differing_keys(before, scheduled({"beta": 0.1}, {"beta": 0.2}, {"beta": 5.0}), finished) == []


def test_schedule_may_be_added_for_the_second_iteration() -> None:
    before = {"spin": {"iterations": 1}}
    assert differing_keys(before, scheduled({}, {"beta": 5.0}), 1) == []
    assert differing_keys(before, scheduled({"beta": 5.0}, {}), 1) == ["spin.schedule"]


@pytest.mark.parametrize("entry", [0, 1])
def test_schedule_of_started_iterations_may_not_change(entry: int) -> None:
    """One is finished, the next one is training."""
    entries: list[dict[str, Any]] = [{}, {}, {}]
    entries[entry] = {"beta": 9.0}
    assert differing_keys(scheduled({}, {}, {}), scheduled(*entries), 2) == ["spin.schedule"]


def test_schedule_of_later_iterations_may_change() -> None:
    assert differing_keys(scheduled({}, {}, {}), scheduled({}, {}, {"learning_rate": 1e-7}), 2) == []


def test_number_that_yaml_reads_as_text_is_a_number() -> None:
    """`5e-5` has no dot, so YAML 1.1 reads it as a string."""
    assert differing_keys(CONFIG | {"learning_rate": "5e-5"}, CONFIG | {"learning_rate": 0.00005}, 1) == []
    assert differing_keys(scheduled({"beta": "1e-1"}), scheduled({"beta": 0.1}), 1) == []
    for old, new in (("5e-5", 0.0005), ("1e5", "100000"), ("abc", 1), (None, "0")):
        assert differing_keys(CONFIG | {"x": old}, CONFIG | {"x": new}, 1) == ["x"]


# --- secrets -----------------------------------------------------------------------------------


def test_listing_the_plugin_is_optional() -> None:
    """Axolotl 0.21 discovers it automatically. Evaluating with lm-evaluation-harness may begin at any time."""
    ours, other = "spin_plugin.SpinPlugin", "axolotl.integrations.liger.LigerPlugin"
    evaluates = "axolotl.integrations.lm_eval.LMEvalPlugin"
    for before, now in (([ours], None), ([ours, other], [other]), (None, [ours]), ([other], [other, evaluates])):
        assert differing_keys(stored(CONFIG | {"plugins": before}), without_secrets(CONFIG | {"plugins": now}), 1) == []
    assert differing_keys(stored(CONFIG), without_secrets(CONFIG | {"plugins": [other]}), 1) == ["plugins"]


def test_secrets_are_left_out_at_every_depth() -> None:
    config = {
        "base_model": "m",
        "hf_token": "hf_secret",
        "WANDB_API_KEY": "secret",
        "hub_token": "secret",
        "db_password": "secret",
        "client_secret": "secret",
        "spin": {"generation": {"vllm_kwargs": {"api_key": "secret", "max_num_seqs": 4}}},
        "datasets": [{"path": "d", "storage_options": {"aws_secret": "secret", "key": 1}}],
        "headers": {"Authorization": "Bearer secret", "X-Api-Key": "secret", "key": "secret", "Accept": "text"},
        "urls": ["postgresql://me:secret@host:5432/db", "https://:secret@host/a@b", "http://host:80/a:b@c"],
    }
    kept = without_secrets(config)
    assert "secret" not in json.dumps(list(_values(kept)))
    assert kept == {
        "base_model": "m",
        "spin": {"generation": {"vllm_kwargs": {"max_num_seqs": 4}}},
        "datasets": [{"path": "d", "storage_options": {"key": 1}}],
        "headers": {"Accept": "text"},
        "urls": ["postgresql://me:***@host:5432/db", "https://:***@host/a@b", "http://host:80/a:b@c"],
    }
    assert config["hf_token"] == "hf_secret", "the caller's configuration was modified"


def _values(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        for value in item.values():
            yield from _values(value)
    elif isinstance(item, list):
        for value in item:
            yield from _values(value)
    else:
        yield item


@pytest.mark.parametrize(
    "harmless",
    [
        {"special_tokens": {"pad_token": "<pad>", "eos_token": "</s>"}},
        {"eot_tokens": ["<|im_end|>"]},
        {"tokens": ["<new>"]},
        {"spin": {"generation": {"max_tokens": 12}}},
        {"tokenizer_config": "org/tokenizer", "tokenizer_type": "AutoTokenizer", "tokenizer_use_fast": True},
        {"added_tokens_overrides": {128041: "<|new|>"}},
        {"hf_use_auth_token": True},
    ],
    ids=lambda config: next(iter(config)),
)
def test_tokenizer_tokens_are_not_secrets(harmless: dict[str, Any]) -> None:
    assert without_secrets(harmless) == harmless


# --- checkpoints and metrics -------------------------------------------------------------------


def test_checkpoints_are_sorted_by_step(tmp_path: Path) -> None:
    """By number, not by name."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-last", "checkpoint-20"):
        (tmp_path / name).mkdir()
    assert [path.name for path in IterationDir(tmp_path).checkpoints()] == [
        "checkpoint-9", "checkpoint-10", "checkpoint-20", "checkpoint-100"
    ]  # fmt: skip


def test_metric_that_a_later_version_added_is_the_mean_over_its_entries(tmp_path: Path) -> None:
    directory = IterationDir(tmp_path)
    lines = [{"step": 1, "epoch": 0.5, "pairs": 4, "spin/loss": 0.7}]
    lines.append({"step": 2, "epoch": 1.0, "pairs": 4, "spin/loss": 0.5, "spin/new": 3.0})
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert directory.last_metrics() == {"step": 2, "epoch": 1.0, "spin/loss": 0.6, "spin/new": 3.0}


def test_last_metrics_are_the_newest_of_each_name(tmp_path: Path) -> None:
    directory = IterationDir(tmp_path)
    assert directory.last_metrics() == {}
    lines = [{"step": 1, "loss": 0.7, "grad_norm": 2.0}, {"step": 2, "eval_loss": 0.6}, {"step": 2, "loss": 0.5}]
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert directory.last_metrics() == {"step": 2, "loss": 0.5, "grad_norm": 2.0, "eval_loss": 0.6}


def test_last_spin_metrics_are_pair_weighted_means_over_the_last_epoch(tmp_path: Path) -> None:
    directory = IterationDir(tmp_path)
    logged = [(0.5, 8, 0.1), (1.0, 8, 0.2), (1.5, 8, 0.6), (2.0, 4, 0.9)]
    lines: list[dict[str, float]] = [
        {"step": step, "epoch": epoch, "pairs": pairs, "spin/accuracy": value}
        for step, (epoch, pairs, value) in enumerate(logged)
    ]
    lines.append({"step": 3, "epoch": 2.0, "train_runtime": 1.0})
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = {"step": 3, "epoch": 2.0, "spin/accuracy": pytest.approx((8 * 0.6 + 4 * 0.9) / 12), "train_runtime": 1.0}
    assert directory.last_metrics() == expected


def test_truncated_last_line_of_the_log_is_skipped(tmp_path: Path) -> None:
    directory = IterationDir(tmp_path)
    directory.metrics.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "lo')
    assert directory.last_metrics() == {"step": 1, "loss": 0.7}


# --- links to the newest model -----------------------------------------------------------------

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def finished_iteration(run: RunDir, number: int, *files: str) -> None:
    directory = run.iteration(number).path
    (directory / "checkpoint-3").mkdir(parents=True)
    (directory / "pairs").mkdir()
    for name in (*MODEL_FILES, *files, "config.yml", "metrics.jsonl", "training_args.bin", "README.md"):
        (directory / name).write_text(f"{name} of {number}")


def test_output_dir_links_to_the_model_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    finished_iteration(run, 0)
    run.link_newest(0)
    links = {path.name: os.readlink(path) for path in tmp_path.iterdir() if path.is_symlink()}
    assert links == {name: f"iteration-0/{name}" for name in MODEL_FILES}


def test_links_replace_those_of_the_previous_iteration(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    finished_iteration(run, 0, "added_tokens.json")
    finished_iteration(run, 1)
    run.link_newest(0)
    run.link_newest(1)
    links = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_symlink()}
    assert links == {name: f"{name} of 1" for name in MODEL_FILES}


def test_links_survive_a_move_of_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "before")
    finished_iteration(run, 0)
    run.link_newest(0)
    run.root.rename(tmp_path / "after")
    assert (tmp_path / "after" / "config.json").read_text() == "config.json of 0"


def test_user_files_are_never_touched(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    finished_iteration(run, 0)
    (tmp_path / "elsewhere").write_text("elsewhere")
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    run.link_newest(0)
    run.link_newest(0)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert not (tmp_path / "config.json").is_symlink()
    assert (tmp_path / "tokenizer.json").read_text() == "elsewhere"
    assert (tmp_path / "model.safetensors").read_text() == "model.safetensors of 0"


def test_broken_user_link_is_never_touched(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    finished_iteration(run, 0)
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    run.link_newest(0)
    assert os.readlink(tmp_path / "config.json") == str(tmp_path / "gone")
    assert (tmp_path / "tokenizer.json").read_text() == "tokenizer.json of 0"
