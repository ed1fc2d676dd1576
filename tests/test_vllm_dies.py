"""vLLM's engine is killed in the middle: one line with the cause, no process left, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
from conftest import Finished
from tiny import spin_config, write_config

pytestmark = pytest.mark.slow


def test_engine_process_is_killed(
    tmp_path: Path, llama: Path, chat_data: Path, command: Callable[..., Finished], vllm_python: Path
) -> None:
    """With the engine in a process of its own, as on GPUs, vLLM 0.32 itself would wait for ever."""
    generation = {"samples_per_prompt": 64, "max_tokens": 110}
    generation["vllm"] = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
    spin = {"iterations": 1, "generation": generation}
    write_config(tmp_path, spin_config(tmp_path, llama, chat_data, spin=spin))
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            ["axolotl", "train", "config.yml", "--launcher", "python"],  # then goes on with `preprocess`, as users do
            cwd=tmp_path,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
        )
    first_shard = tmp_path / "run/iteration-0/synthetic/shard-00000.jsonl"
    while not first_shard.exists():
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    listening = [
        (child.cmdline(), connection.laddr)
        for child in family
        for connection in child.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and not ip_address(connection.laddr.ip).is_loopback
    ]
    assert not listening, "a port that others can reach"
    (engine,) = [child for child in family if "EngineCore" in " ".join(child.cmdline())]
    os.kill(engine.pid, signal.SIGKILL)
    assert process.wait(timeout=120) == 1
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("spin: error: ")]
    assert len(errors) == 1
    assert "engine" in errors[0].lower()
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    kept = first_shard.stat().st_mtime_ns
    done = command("axolotl", "preprocess", "config.yml", folder=tmp_path)
    assert done.code == 0, done.output[-3000:]
    assert first_shard.stat().st_mtime_ns == kept
