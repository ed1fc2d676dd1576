"""vLLM is killed at every start: one line with the cause, no process left, and a rerun continues.

test_engines.py kills engines while they generate.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import Finished
from tiny import spin_config, write_config

pytestmark = pytest.mark.slow


def is_gone(process: psutil.Process) -> bool:
    """Whether it has exited, or is a zombie that init did not reap."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_vllm_is_killed_in_both_attempts(
    tmp_path: Path, llama: Path, chat_data: Path, command: Callable[..., Finished], vllm_python: Path
) -> None:
    """A worker is killed as soon as it exists, seconds before it could answer."""
    write_config(tmp_path, spin_config(tmp_path, llama, chat_data, spin={"iterations": 1}))
    children: set[psutil.Process] = set()
    killed = set()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            ["axolotl", "train", "config.yml", "--launcher", "python"],  # later continued with `preprocess`
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
        )
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                children |= set(psutil.Process(process.pid).children(recursive=True))
            for child in children - killed:
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if any("vllm_worker.py" in part for part in child.cmdline()):
                        child.kill()
                        killed.add(child)
            time.sleep(0.05)
    lines = (tmp_path / "log").read_text().splitlines()
    assert process.returncode == 1, "\n".join(lines[-50:])
    assert len(killed) == 2
    for kind, said in (("warning", "once more with less memory"), ("error", "rerun the same command")):
        (line,) = [line for line in lines if line.startswith(f"spin: {kind}: ") and "vLLM stopped" in line]
        assert "killed by signal 9" in line
        assert said in line
    deadline = time.monotonic() + 30  # Python's helper processes exit a moment after their parent
    while left := [child for child in children if not is_gone(child)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

    done = command("axolotl", "preprocess", "config.yml", directory=tmp_path)
    assert done.code == 0, done.output[-3000:]
    assert (tmp_path / "run/iteration-0/synthetic/shard-00000.jsonl").exists()
