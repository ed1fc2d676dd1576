"""`axolotl spin status` shows findings below its table, also those of the unfinished iteration."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import spin_config, write_config

from spin_plugin.cli import spin
from spin_plugin.objective.finding import Finding, as_dicts
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState

FOUND = Finding("divergence", "the model is 0.71 nats per token away", "lower learning_rate")
METRICS = {"step": 4, "spin/loss": 0.2, "spin/reward_margin": 2.1, "spin/accuracy": 0.9}


def stats(**newest: int) -> dict[str, Any]:
    counts = {"responses": 64, "truncated": 0, "equal": 0, "distinct_real": 60, "distinct_synthetic": 60} | newest
    lengths = {"real_mean": 18.2, "synthetic_mean": 19.0}
    shared = {"responses": 64, "pairs": 64, "equal": counts["equal"], "equal_dropped": False, **lengths}
    return {"train": shared | {"newest": counts | lengths}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Iteration 0 is finished; iteration 1 has logged two steps."""
    path = write_config(tmp_path, spin_config(tmp_path, tmp_path / "model", tmp_path / "data"))
    run = RunDir(tmp_path / "run")
    unfinished = run.iteration(1)
    unfinished.pairs.mkdir(parents=True)
    entry = {"iteration": 0, "pairs": stats(), "metrics": METRICS}
    entry |= {"divergence": 0.71, "findings": as_dicts([FOUND])}
    run.write_state(RunState({}, [entry]))
    (unfinished.pairs / "stats.json").write_text(json.dumps(stats(truncated=48)))
    unfinished.metrics.write_text(json.dumps({"step": 1, "epoch": 0.1}) + "\n")
    return path


def status(config: Path, *options: str) -> str:
    done = CliRunner().invoke(spin, ["status", str(config), *options])
    assert done.exit_code == 0
    return done.output


def test_one_line_per_finding_below_a_table_of_80_columns(config: Path) -> None:
    *table, first, second = status(config).splitlines()
    assert first == f"iteration 0: {FOUND.message}; {FOUND.advice}"
    assert second.startswith("iteration 1: 75% of the synthetic responses reach the length limit without an end; ")
    (row,) = [line for line in table if "finished" in line]
    assert row.split()[-1] == "0.7100"
    assert len(row) <= 80


def test_brackets_are_text_and_not_markup(config: Path) -> None:
    """lm-eval's names, paths and findings may contain them."""
    run = RunDir(config.parent / "run")
    state = run.read_state()
    assert state is not None
    marked = Finding("divergence", "far [red]away[/red] [/]", "see [link=x]")
    state.finished[0] |= {"findings": as_dicts([marked]), "lm_eval": {"[bold]task/acc[/]": 0.5}}
    run.write_state(state)
    shown = status(config)
    assert f"iteration 0: {marked}\n" in shown
    assert "[bold]task/acc[/]" in shown


def test_json_has_all(config: Path) -> None:
    first, second = json.loads(status(config, "--json"))["iterations"]
    assert first["findings"] == as_dicts([FOUND])
    assert first["divergence"] == 0.71
    assert [finding["name"] for finding in second["findings"]] == ["truncated"]


def test_run_of_an_earlier_version_has_neither(config: Path) -> None:
    run = RunDir(config.parent / "run")
    state = run.read_state()
    assert state is not None
    state.finished[0] = {"iteration": 0, "pairs": {}, "metrics": METRICS}
    run.write_state(state)
    (run.iteration(1).pairs / "stats.json").unlink()
    assert "KL" not in status(config)
    assert "iteration " not in status(config)
