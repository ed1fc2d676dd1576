"""Training on a CPU uses all cores, unless the user has set the number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from spin_plugin.training import threads
from spin_plugin.training.threads import cores

# What `accelerate launch` does to the environment of the process that it starts.
LAUNCHER = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
TRAINING = """
import torch
from spin_plugin.training.threads import use_all_cores
use_all_cores()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("name", "variables", "options", "expected"),
    [
        ("accelerate", {}, [], cores()),
        ("accelerate", {"LOCAL_WORLD_SIZE": str(cores())}, [], 1),
        ("accelerate", {"OMP_NUM_THREADS": "1"}, [], 1),
        ("accelerate", {}, ["--num-cpu-threads-per-process=1"], 1),
        ("shell", {}, [], 1),  # without a launcher, torch's own choice
    ],
)
def test_threads(tmp_path: Path, name: str, variables: dict[str, str], options: list[str], expected: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    (tmp_path / name).write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / name), TRAINING, *options]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == expected


@pytest.mark.parametrize(("limit", "expected"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", cores())])
def test_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert cores() == expected
