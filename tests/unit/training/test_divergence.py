"""What is recorded after the last step, of pairs on disk.

The divergence is left out, without an error, where iteration 0's files are gone, damaged or of another version.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT
from datasets import Dataset

from spin_plugin.args import SpinArgs
from spin_plugin.data.table import open_table
from spin_plugin.run.directory import RunDir
from spin_plugin.training.decline import HeldOutCheck

FROZEN = ROOT / "tests/data/run-0.2/run"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "pairs deleted": shutil.rmtree,
    "a table deleted": lambda pairs: (pairs / "eval.arrow").unlink(),
    "a table damaged": lambda pairs: (pairs / "eval.arrow").write_bytes(b"garbage"),
    "statistics damaged": lambda pairs: (pairs / "stats.json").write_bytes(b"{"),
    "statistics of another version": lambda pairs: (pairs / "stats.json").write_text(json.dumps({"train": {"new": 1}})),
    "log-probs deleted": lambda pairs: (pairs / "opponent-eval.safetensors").unlink(),
    "log-probs of other pairs": lambda pairs: shutil.copy(pairs / "train.arrow", pairs / "eval.arrow"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_later_iterations_go_on_without_it(tmp_path: Path, damage: str) -> None:
    run = RunDir(shutil.copytree(FROZEN, tmp_path / "run", symlinks=True))
    pairs = open_table(FROZEN / "iteration-0/pairs/eval.arrow")
    DAMAGES[damage](run.iteration(0).pairs)
    PartialState(cpu=True)
    assert recorded_divergence(run, pairs) == {}


def recorded_divergence(run: RunDir, pairs: Dataset) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    task = SimpleNamespace(run=run, number=1, record=recorded.__setitem__)
    trainer = SimpleNamespace(task=task, args=SimpleNamespace(device=torch.device("cpu")))
    values = torch.zeros(2 * len(pairs))
    HeldOutCheck(trainer)._record_divergence(pairs, values, values)
    return recorded


RANKS = """
import os, sys
from pathlib import Path
from accelerate import PartialState
from test_divergence import FROZEN, recorded_divergence
from spin_plugin.data.table import open_table
from spin_plugin.run.directory import RunDir

ranks = []
for rank in range(2):
    ranks.append(os.fork())
    if not ranks[-1]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code = 1
        try:
            PartialState(cpu=True)
            pairs = open_table(FROZEN / "iteration-0/pairs/eval.arrow")
            code = len(recorded_divergence(RunDir(Path(sys.argv[1 + rank])), pairs))
        finally:
            os._exit(code)
sys.exit(any([os.waitpid(rank, 0)[1] for rank in ranks]))
"""


@pytest.mark.parametrize("blind", [0, 1])
def test_ranks_agree_where_one_of_them_does_not_see_the_files(tmp_path: Path, blind: int) -> None:
    runs = [shutil.copytree(FROZEN, tmp_path / str(rank), symlinks=True) for rank in range(2)]
    shutil.rmtree(runs[blind] / "iteration-0/pairs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", RANKS, *runs],
        env=os.environ | address | {"PYTHONPATH": path},
        timeout=120,  # if they do not agree, one waits for good
        check=False,
    )
    assert done.returncode == 0


def test_error_of_the_mean_margin_counts_rows(tmp_path: Path) -> None:
    """Two responses to each of two prompts of one row, and two to that of another: two independent margins."""
    recorded: dict[str, Any] = {}
    rows = torch.tensor([7, 7, 8])
    directory = RunDir(tmp_path).iteration(0)
    directory.pairs.mkdir(parents=True)
    task = SimpleNamespace(
        spin=SpinArgs(beta=1.0),
        directory=directory,
        pairs=SimpleNamespace(held_out_rows=rows),
        record=recorded.__setitem__,
    )
    trainer = SimpleNamespace(task=task, is_world_process_zero=lambda: True, pair_keys={"eval": "key"})
    pairs = Dataset.from_dict({"example": [0, 0, 1, 1, 2, 2]})
    margins = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    after = torch.stack([margins, torch.zeros(6)], dim=1).flatten()
    check = HeldOutCheck(trainer)
    check._record_rewards(pairs, torch.zeros(12), after)
    assert recorded["held_out_pairs"]["reward_margin"] == 3.5
    # 2.5 and 5.5: a standard deviation of 3 / sqrt(2), divided by sqrt(2)
    assert recorded["held_out_pairs"]["margin_error"] == pytest.approx(1.5)
    task.pairs.held_out_rows = None  # of an older run: each prompt counts
    check._record_rewards(pairs, torch.zeros(12), after)
    assert recorded["held_out_pairs"]["margin_error"] == pytest.approx(2 / 3**0.5)
