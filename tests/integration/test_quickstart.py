"""The README's quickstart: self-play improves the tiny model on held-out prompts."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT, Finished

from spin_plugin.cli.screen import PROGRESS

pytestmark = [pytest.mark.slow, pytest.mark.oldest]
LINES, COLUMNS = 60, 100  # what a user gets to see at most, and the width of the terminal
SETUP_LINES = 6  # of a bare clone; here the environments exist
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "outputs", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh copy of the checkout with vLLM's environment linked; Axolotl's is this test's environment."""
    checkout = tmp_path / "spin-plugin"
    shutil.copytree(ROOT, checkout, ignore=NOT_COPIED)
    (checkout / ".venv-vllm").symlink_to(ROOT / ".venv-vllm")
    return checkout


def test_quickstart_improves_the_model_and_a_rerun_changes_nothing(
    checkout: Path, command: Callable[..., Finished]
) -> None:
    here = {"VENV": sys.prefix}
    done = command(checkout / "scripts/quickstart.sh", directory=checkout, environment=here)
    assert done.code == 0, done.output[-3000:]
    assert f"axolotl {version('axolotl')}" in done.output
    shown = done.output.splitlines()
    assert len(shown) + SETUP_LINES <= LINES, done.output
    rows = [math.ceil(len(line) / COLUMNS) for line in shown if not PROGRESS.match(line)]  # which a terminal replaces
    assert sum(rows) + SETUP_LINES <= LINES, done.output
    run = checkout / "outputs/spin-tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert [entry["iteration"] for entry in summary["iterations"]] == [0, 1, 2, 3]
    finished = json.loads((run / "run.json").read_text())["finished"]
    assert [entry["findings"] for entry in finished] == [[], [], [], []], "the run is healthy"
    means = [(entry["in_domain"] + entry["out_of_domain"]) / 2 for entry in (summary["sft"], *summary["iterations"])]
    assert means[-1] - means[0] >= 10
    for number in range(4):
        first = json.loads((run / f"iteration-{number}/metrics.jsonl").read_text().splitlines()[0])
        assert first["spin/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["spin/reward_margin"] == pytest.approx(0, abs=1e-6)

    before = {path: path.read_bytes() for path in (run / "run.json", run / "summary.json")}
    again = command(checkout / "scripts/quickstart.sh", directory=checkout, environment=here)
    assert again.code == 0
    assert "all 4 iterations" in again.output
    on_a_terminal = f"stty cols {COLUMNS}; scripts/quickstart.sh"
    third = command("script", "-qec", on_a_terminal, "/dev/null", directory=checkout, environment=here)
    assert third.code == 0
    assert "all 4 iterations" in third.output
    assert third.output.count("\n") < LINES / 2, third.output
    assert {path: path.read_bytes() for path in before} == before
