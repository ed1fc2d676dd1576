"""A killed iteration resumes where it stopped and ends like an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Finished
from safetensors.torch import load_file
from tiny import spin_config, write_config

pytestmark = pytest.mark.slow
Command = Callable[..., Finished]


def kill_when(directory: Path, reached: Callable[[], bool], **environment: str) -> None:
    """Start `axolotl train` and kill its process group as soon as `reached()` is true."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(directory / "killed.log", "w") as log:
        process = subprocess.Popen(
            ["axolotl", "train", "config.yml"],
            cwd=directory,
            env=os.environ | {"PATH": path} | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while not reached():
            assert process.poll() is None, (directory / "killed.log").read_text()[-3000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shards(directory: Path) -> list[Path]:
    return sorted((directory / "run/iteration-0/synthetic").glob("shard-*.jsonl"))


def test_killed_in_generation_and_in_training(tmp_path: Path, llama: Path, chat_data: Path, command: Command) -> None:
    """Killed while generating, then after the first checkpoint; compared with an undisturbed run."""
    spin = {"iterations": 1, "group_prompts": "auto", "generation": {"num_generations": 25, "max_tokens": 100}}
    spin["generation"]["vllm_kwargs"] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
    changes = {"save_steps": 10, "micro_batch_size": 16, "sequence_len": 160, "dropout": None}
    directories = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for directory in directories.values():
        directory.mkdir()
        write_config(directory, spin_config(directory, llama, chat_data, spin=spin, **changes))
    assert command("axolotl", "train", "config.yml", directory=directories["undisturbed"]).code == 0

    killed = directories["killed"]
    kill_when(killed, lambda: len(shards(killed)) >= 1)
    kept = {path.name: path.stat().st_mtime_ns for path in shards(killed)}
    assert 1 <= len(kept) < len(shards(directories["undisturbed"]))
    kill_when(killed, (killed / "run/iteration-0/checkpoint-10/trainer_state.json").exists)
    assert {path.name: path.stat().st_mtime_ns for path in shards(killed) if path.name in kept} == kept
    opponent = (killed / "run/iteration-0/pairs/opponent-train.safetensors").stat().st_mtime_ns
    done = command("axolotl", "train", "config.yml", directory=killed)
    assert done.code == 0, done.output[-3000:]
    assert "resuming at step" in done.output
    assert (killed / "run/iteration-0/pairs/opponent-train.safetensors").stat().st_mtime_ns == opponent

    first, second = (directory / "run/iteration-0" for directory in directories.values())
    for one, other in zip(shards(directories["undisturbed"]), shards(killed), strict=True):
        assert one.read_bytes() == other.read_bytes()
    steps = [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    weights, again = (load_file(directory / "model.safetensors") for directory in (first, second))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items()), "weights are not bit-identical"
