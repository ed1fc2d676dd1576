"""A run that has stopped: its last scores, results and report are made up for, whatever a kill has interrupted."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import spin_config

import spin_plugin.training.iteration as iteration_module
from spin_plugin.args import SpinArgs
from spin_plugin.config.lower import lower
from spin_plugin.console import SpinError
from spin_plugin.objective.decline import Comparison
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState
from spin_plugin.run.stop import end_if_stopped
from spin_plugin.training import evaluation
from spin_plugin.training.start import start_iteration
from spin_plugin.training.trackers import Trackers

# In place of lm-evaluation-harness.
LM_EVAL = """
import json, pathlib, sys
output = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1])
output.mkdir(parents=True)
content = {"results": {"tiny": {"acc,none": 0.1}}, "higher_is_better": {}}
(output / "results_1.json").write_text(json.dumps(content))
"""
# Iteration 0 improves the model, iteration 1 makes it worse.
CHANGES = [Comparison(64, -0.4, -0.3, 0.1, (0.05, 0.15)), Comparison(64, -0.3, -0.5, -0.2, (-0.3, -0.1))]
Start = Callable[..., None]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the environment variables through which trackers are configured."""
    monkeypatch.setattr(evaluation, "LM_EVAL", LM_EVAL)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def start(run: RunDir, tmp_path: Path, llama: Path, chat_data: Path) -> Start:
    """Start iteration 2 of 3 after two iterations with these scores of lm-eval; None: a kill has interrupted it."""

    def start(*scores: float | None, **stop: Any) -> None:
        task = tmp_path / "tiny.yaml"
        task.write_text("task: tiny")
        spin = {"iterations": 3, "judge": {"function": "exact"}, "stop": {"metric": "tiny/acc"} | stop}
        lm_eval = {"lm_eval_tasks": [str(task)], "lm_eval_post_train": True}
        plugins = ["spin_plugin.SpinPlugin", "axolotl.integrations.lm_eval.LMEvalPlugin"]
        config = DictDefault(
            spin_config(tmp_path, llama, chat_data, spin=spin, plugins=plugins, use_tensorboard=True, **lm_eval)
        )
        entries = []
        for number, score in enumerate(scores):
            entry = {"iteration": number, "pairs": {}, "metrics": {}, "held_out": CHANGES[number].as_dict()}
            entry |= {"judge": CHANGES[0].as_dict()} if number == 0 else {}
            entries.append(entry if score is None else entry | {"lm_eval": {"tiny/acc": score}})
            one = run.iteration(number)
            shutil.copytree(llama, one.path)
            one.pairs.mkdir()
            one.config.write_text(yaml.safe_dump({"base_model": str(llama)}))
            Trackers(config, config, run).begin(number)
        stored = lower(DictDefault(json.loads(json.dumps(config)))).config
        run.write_state(RunState(stored, entries, "0"))
        start_iteration(config, lower(config), [], for_training=True)

    return start


def scores(run: RunDir) -> list[float]:
    state = run.read_state()
    assert state is not None
    return [entry["lm_eval"]["tiny/acc"] for entry in state.finished]


def sent(run: RunDir, number: int, name: str) -> list[float]:
    """Return what TensorBoard shows."""
    events = EventAccumulator(str(run.iteration(number).tensorboard))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def assert_complete(run: RunDir) -> None:
    """run.json, TensorBoard and the report have every score, and nothing was generated."""
    for number, score in enumerate(scores(run)):
        assert sent(run, number, "lm_eval/tiny/acc") == pytest.approx([score])
    shown = json.loads(run.report.with_suffix(".json").read_text())["iterations"]
    assert [entry["lm_eval"]["tiny/acc"] for entry in shown[:2]] == scores(run)
    assert not run.iteration(2).path.exists()


def test_score_that_a_kill_has_delayed_stops_the_run(
    start: Start, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        start(0.5, None)
    assert ended.value.code == 0
    assert "tiny/acc has not improved since iteration 0" in capsys.readouterr().out
    assert scores(run) == [0.5, 0.1]
    assert_complete(run)


def test_stopped_run_is_evaluated_to_the_end(start: Start, run: RunDir) -> None:
    """The held-out responses have stopped it."""
    with pytest.raises(SystemExit) as ended:
        start(0.5, None, metric="auto")
    assert ended.value.code == 0
    assert_complete(run)


def test_results_by_which_a_judge_ends_the_run_are_sent(
    start: Start, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are known only once the next iteration is prepared."""

    def judge(_cfg: Any, _run: RunDir, spin: SpinArgs, _number: int) -> None:
        state = run.read_state()
        assert state is not None
        state.finished[1]["judge"] = CHANGES[1].as_dict()
        run.write_state(state)
        end_if_stopped(run, spin)

    monkeypatch.setattr(iteration_module, "prepare_iteration", judge)
    with pytest.raises(SystemExit):
        start(0.5, 0.6, metric="judge")
    assert_complete(run)
    assert sent(run, 1, "judge/after") == pytest.approx([CHANGES[1].after])
    shown = json.loads(run.report.with_suffix(".json").read_text())["iterations"]
    assert shown[1]["judge"]["after"] == CHANGES[1].after


def test_run_whose_metric_is_not_measured_shows_what_is(start: Start, run: RunDir) -> None:
    with pytest.raises(SpinError, match=r"spin.stop.metric: other/acc was not measured in iteration 1"):
        start(0.5, 0.4, metric="other/acc")
    assert_complete(run)


@pytest.mark.parametrize("metric", ["task/acc", "other/acc"], ids=["stopped", "not measured"])
def test_only_the_first_rank_says_why(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    """The others exit with 0: at another code a launcher would terminate the first before it does."""
    run.root.mkdir()
    run.write_state(RunState({}, [{"lm_eval": {"task/acc": score}} for score in (0.5, 0.4)]))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        end_if_stopped(run, SpinArgs.model_validate({"stop": {"metric": metric}}))
    assert ended.value.code == 0
    assert capsys.readouterr().out == ""
