"""Trackers: names, what is sent twice, and the results; tests/integration/test_evaluated_and_tracked.py trains."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState
from spin_plugin.training.trackers import TrackedRun, Trackers

ENTRY: dict[str, Any] = {
    "iteration": 0,
    "finished_at": "2026",
    "metrics": {"step": 6, "spin/loss": 0.5},
    "pairs": {"train": {"pairs": 24, "equal_dropped": False}},
    "held_out": {"before": -1.5, "after": float("nan")},
    "findings": [{"name": "lengths"}],
    "divergence": 0.25,
}
SENT = {"pairs/train/pairs": 24.0, "held_out/before": -1.5, "divergence": 0.25}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore the environment variables through which trackers are configured."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "my-spin")
    run.iteration(0).pairs.mkdir(parents=True)
    return run


def trackers(run: RunDir, **config: Any) -> Trackers:
    return Trackers(DictDefault(config), config, run)


def log(run: RunDir, *entries: dict[str, Any]) -> None:
    run.iteration(0).metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def scalars(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: steps and values by name."""
    events = EventAccumulator(str(run.iteration(0).tensorboard))
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_without_a_tracker_nothing_is_written(run: RunDir) -> None:
    before = dict(os.environ)
    none = trackers(run)
    none.begin(0)
    none.send_results()
    assert none.training_arguments(0) == {}
    assert list(run.iteration(0).pairs.iterdir()) == []
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("config", "group"),
    [({}, "my-spin"), ({"wandb_name": "ours"}, "ours"), ({"mlflow_run_name": "theirs"}, "theirs")],
)
def test_runs_are_named_after_the_group(run: RunDir, config: dict[str, Any], group: str) -> None:
    named = trackers(run, use_wandb=True, **config)
    named.begin(0)
    assert named.training_arguments(0)["run_name"] == f"{group}-iteration-0"
    assert os.environ["WANDB_RUN_GROUP"] == group


def test_run_is_continued_until_the_pairs_change(run: RunDir) -> None:
    trackers(run, use_wandb=True).begin(0)
    first = os.environ["WANDB_RUN_ID"]
    trackers(run, use_wandb=True).begin(0)
    assert os.environ["WANDB_RUN_ID"] == first
    (run.iteration(0).pairs / "trackers.json").unlink()
    trackers(run, use_wandb=True).begin(0)
    assert os.environ["WANDB_RUN_ID"] != first


def test_trackio_continues_runs_by_name_so_each_has_its_own(run: RunDir) -> None:
    names = set()
    for _ in range(2):
        own = trackers(run, use_trackio=True, trackio_project_name="p")
        own.begin(0)
        names.add(own.training_arguments(0)["run_name"])
        assert own.training_arguments(0)["project"] == "p"
        (run.iteration(0).pairs / "trackers.json").unlink()
    assert len(names) == 2


def test_entries_sent_before_a_kill_are_not_sent_again(run: RunDir, tmp_path: Path) -> None:
    """Killed twice, the second time before the steps of the first were reached again. An evaluation at the step of the
    kill was not sent."""
    used = trackers(run, use_tensorboard=True)
    used.begin(0)
    counts = {"pairs": 4, "tokens": 90, "seconds": 0.5}  # in the order of `SpinTrainer.log`
    log(run, *({"step": step, "epoch": 0, **counts, "loss": 1.0} for step in (1, 2, 3)))
    used.begin(0)
    log(run, {"step": 1, "epoch": 0, **counts, "loss": 1.0}, {"step": 2, "epoch": 0, "eval_loss": 1.0})
    used.begin(0)
    tracked = TrackedRun.read(run.iteration(0))
    assert tracked is not None
    assert tracked.sent == {"loss": 3, "eval_loss": 2}

    args = TrainingArguments(output_dir=str(tmp_path), report_to=["tensorboard"], use_cpu=True)
    handler = CallbackHandler([TensorBoardCallback()], None, None, None, None)
    used.attach(SimpleNamespace(args=args, callback_handler=handler), 0)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    handler.on_train_begin(args, state, control)
    for state.global_step in range(1, 6):
        handler.on_log(args, state, control, {"loss": 0.1 * state.global_step, "epoch": 0})
        handler.on_log(args, state, control, {"eval_loss": 0.5, "epoch": 0})
    handler.on_train_end(args, state, control)
    found = scalars(run)
    assert [step for step, _ in found["train/loss"]] == [4, 5]
    assert [step for step, _ in found["eval/loss"]] == [3, 4, 5]


def test_results_are_sent_once_and_later_ones_follow(run: RunDir) -> None:
    used = trackers(run, use_tensorboard=True)
    used.begin(0)
    run.write_state(RunState({}, [ENTRY]))
    used.send_results()
    used.send_results()
    assert scalars(run) == {name: [(6, value)] for name, value in SENT.items()}
    run.write_state(RunState({}, [ENTRY | {"lm_eval": {"tiny/acc": 0.5}}]))
    used.send_results()
    assert scalars(run) == {name: [(6, value)] for name, value in (SENT | {"lm_eval/tiny/acc": 0.5}).items()}


def test_tracker_that_fails_loses_nothing(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    used = trackers(run, use_tensorboard=True)
    used.begin(0)
    run.write_state(RunState({}, [ENTRY]))
    run.iteration(0).tensorboard.write_text("in the way")
    used.send_results()
    assert (
        "iteration 0: tensorboard did not take its results; they are sent at the next start" in capsys.readouterr().out
    )
    run.iteration(0).tensorboard.unlink()
    used.send_results()
    assert scalars(run) == {name: [(6, value)] for name, value in SENT.items()}
