"""The progress of training: few numbers, no dictionaries."""

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerState

from spin_plugin.training import progress
from spin_plugin.training.progress import TrainingProgress

LOGS = {
    "loss": 0.61,
    "grad_norm": 7.0,
    "spin/loss": 0.6123,
    "spin/reward_margin": 0.2,
    "spin/accuracy": 0.828,
    "spin/reward_real": 0.011,
    "spin/reward_synthetic": -0.189,
    "spin/logp_real": -3.1,
}


def train(*, main: bool = True, steps: int = 3, evaluate: bool = False, pause: float = 0.0) -> None:
    """Send the events of training with one log per step."""
    shown, control = TrainingProgress(2), SimpleNamespace()
    state = TrainerState(max_steps=steps + 1, global_step=1, is_world_process_zero=main)  # resumed after a step
    events: Any = (SimpleNamespace(), state, control)
    for _ in range(steps):
        shown.on_step_begin(*events)
        state.global_step += 1
        shown.on_log(*events, logs=dict(LOGS))
        shown.on_step_end(*events)
        if evaluate:
            for _ in range(2):
                shown.on_prediction_step(*events, eval_dataloader=[0, 1])
            time.sleep(pause)
            shown.on_log(*events, logs={"eval_loss": 1.0})
            shown.on_evaluate(*events)
    shown.on_train_end(*events)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_pipe_gets_lines_with_five_numbers_and_the_time_left(
    capsys: pytest.CaptureFixture[str], evaluate: bool
) -> None:
    train(evaluate=evaluate)
    first, *_, last = capsys.readouterr().out.splitlines()
    numbers = "loss 0.612, margin +0.200, accuracy 83%, real +0.011, synthetic −0.189"
    assert first.startswith(f"spin: iteration 2: training: step 2 of 4, {numbers}, 0.0 s/step")
    assert first.endswith("s left")
    assert last.startswith("spin: iteration 2: training: step 4 of 4, ")


def test_short_trainings_print_nothing_in_between(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("every_step")
def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    train(main=False)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("every_step")
def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=140, soft_wrap=True))
    train(evaluate=True, pause=0.3)  # a bar is drawn ten times a second
    assert "margin +0.200" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "held-out pairs" in screen.getvalue()
    assert capsys.readouterr().out == "", "no lines beside the bar"
