"""Progress of training: a bar with five numbers on a terminal, otherwise a line every 20 seconds.

It replaces transformers' bar, which prints every metric of every step; those are in metrics.jsonl.
"""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin_plugin.console import console, say

LOG_INTERVAL = 20.0
# What the user watches, and how it is shown.
SHOWN = {
    "spin/loss": "loss {:.3f}",
    "spin/reward_margin": "margin {:+.3f}",
    "spin/accuracy": "accuracy {:.0%}",
    "spin/reward_real": "real {:+.3f}",
    "spin/reward_synthetic": "synthetic {:+.3f}",
}


class TrainingProgress(TrainerCallback):
    """Steps done, the latest metrics, and the time left. Only the main process shows it."""

    def __init__(self, iteration: int) -> None:
        self.title = f"iteration {iteration}: training"
        self.numbers = ""
        self.bar: Progress | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start with the first step, because other callbacks show bars of their own at the beginning of training."""
        if self.bar is not None or not state.is_world_process_zero:
            return
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.first, self.started = state.global_step, time.monotonic()
        self.last_line = self.started
        self.steps = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, numbers="")
        self.evaluated = self.bar.add_task("held-out pairs", visible=False, numbers="")
        self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if SHOWN.keys() <= logs.keys():
            self.numbers = ", ".join(shown.format(logs[name]) for name, shown in SHOWN.items()).replace("-", "−")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.steps, completed=state.global_step, numbers=self.numbers)
            self._say(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            total = len(kwargs["eval_dataloader"])
            self.bar.update(self.evaluated, advance=1, total=total, visible=True)
            self._say(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.reset(self.evaluated, visible=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _say(self, state: TrainerState) -> None:
        """Print a line unless a bar shows the same or the last line is recent."""
        now, done = time.monotonic(), state.global_step - self.first
        if console.is_terminal or not done or now - self.last_line < LOG_INTERVAL:
            return
        self.last_line = now
        each = (now - self.started) / done
        left = f"{each:.1f} s/step, {each * (state.max_steps - state.global_step):.0f} s left"
        numbers = f"{self.numbers}, " if self.numbers else ""
        say(f"{self.title}: step {state.global_step:,} of {state.max_steps:,}, {numbers}{left}")
