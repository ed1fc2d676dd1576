"""Training on a CPU uses all cores, unless the user has set the number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

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
CORES = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False))


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("accelerate", {}, CORES),
        ("accelerate", {"LOCAL_WORLD_SIZE": str(CORES)}, 1),
        ("accelerate", {"OMP_NUM_THREADS": "1"}, 1),
        ("shell", {}, 1),  # without a launcher, torch's own choice
    ],
)
def test_threads(tmp_path: Path, name: str, variables: dict[str, str], expected: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | variables
    (tmp_path / name).write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / name), TRAINING]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected
