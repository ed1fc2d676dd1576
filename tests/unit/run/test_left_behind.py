"""A process whose launcher was killed exits, and its children with it."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
TRAINING = """
import subprocess, sys, time
from spin_plugin.run.processes import exit_with_launcher
exit_with_launcher()
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("name", ["accelerate", "torchrun", "shell"])
def test_training_exits_with_its_launcher_but_not_with_a_shell(tmp_path: Path, name: str) -> None:
    """`accelerate launch` and torchrun are Python scripts; a shell may exit first under `nohup`."""
    (tmp_path / name).write_text(LAUNCHER)
    launcher = psutil.Popen([sys.executable, tmp_path / name, TRAINING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "ready\n"
    children = launcher.children(recursive=True)
    assert len(children) == 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(children, timeout=3 if name == "shell" else 60)
    assert len(alive) == (2 if name == "shell" else 0)
    for process in alive:
        process.kill()
