"""The divergence is left out, without an error, where iteration 0's files are gone or damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT

from spin_plugin.data.table import open_table
from spin_plugin.run.directory import RunDir
from spin_plugin.training.decline import HeldOutCheck

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "pairs deleted": shutil.rmtree,
    "a table deleted": lambda pairs: (pairs / "eval.arrow").unlink(),
    "a table damaged": lambda pairs: (pairs / "eval.arrow").write_bytes(b"garbage"),
    "statistics damaged": lambda pairs: (pairs / "stats.json").write_bytes(b"{"),
    "log-probs deleted": lambda pairs: (pairs / "opponent-eval.safetensors").unlink(),
    "log-probs of other pairs": lambda pairs: shutil.copy(pairs / "train.arrow", pairs / "eval.arrow"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_later_iterations_go_on_without_it(tmp_path: Path, damage: str) -> None:
    run = RunDir(shutil.copytree(ROOT / "tests/data/run-0.2/run", tmp_path / "run", symlinks=True))
    pairs = open_table(ROOT / "tests/data/run-0.2/run/iteration-0/pairs/eval.arrow")
    DAMAGES[damage](run.iteration(0).pairs)
    PartialState(cpu=True)
    recorded: dict[str, Any] = {}
    task = SimpleNamespace(run=run, number=1, record=recorded.__setitem__)
    trainer = SimpleNamespace(task=task, args=SimpleNamespace(device=torch.device("cpu")))
    values = torch.zeros(2 * len(pairs))
    HeldOutCheck(trainer)._record_divergence(pairs, values, values)
    assert recorded == {}
