"""A run that version 0.2.0 started continues under this version. `tests/freeze_run.py` wrote it."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Finished
from test_pipeline import logged

from spin_plugin.generation.shards import Shards
from spin_plugin.run.directory import RunDir
from spin_plugin.training.prepare import open_pairs


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests/data/run-0.2", tmp_path / "frozen", symlinks=True))


def content(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def test_every_file_of_the_frozen_run_is_read(frozen: Path, command: Callable[..., Finished]) -> None:
    run = RunDir(frozen / "run")
    state, pairs = run.read_state(), open_pairs(run.iteration(0))
    assert state is not None
    assert state.version == "0.2.0"
    assert pairs.stats["train"].pairs == len(pairs.train) == 8
    assert len(list(Shards(run.iteration(0).synthetic).responses())) == 12
    status = command("axolotl", "spin", "status", "config.yml", directory=frozen)
    assert status.code == 0, status.output
    assert "not started" in status.output


@pytest.mark.slow
def test_frozen_run_continues(frozen: Path, run_jobs: Callable[..., None]) -> None:
    run = RunDir(frozen / "run")
    kept = [run.real, run.iteration(0).synthetic, run.iteration(0).pairs]
    before = [content(directory) for directory in kept]
    run_jobs((frozen / "config.yml", 1))
    assert run.finished() == 2
    assert [content(directory) for directory in kept] == before
    assert set(open_pairs(run.iteration(1)).train["iteration"]) == {0, 1}
    assert logged(run.root, 1)[0]["spin/loss"] == pytest.approx(math.log(2), abs=1e-6)
