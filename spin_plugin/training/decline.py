"""Warn when real responses become less likely: at the end of training on held-out prompts, before that from the log."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pyarrow.compute import list_value_length
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin_plugin.console import SpinError, exit_on_error, say, warn
from spin_plugin.model.layout import response_indices
from spin_plugin.objective.decline import FEWEST_PROMPTS, REMEDIES, WINDOW, compare, negative_real_reward
from spin_plugin.training.scorer import score_pairs


class HeldOutCheck(TrainerCallback):
    """Compares the trained model with the opponent on the real responses of held-out prompts.

    It must follow the callbacks that change the weights at the end of training. If the run is killed before the
    iteration is finished, training resumes without a step left and ends here again.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a SpinTrainer, whose module imports this one

    @exit_on_error
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, pairs = self.trainer, self.trainer.task.pairs.eval
        if pairs is None:
            return
        # A prompt's real response counts once, however many pairs it has.
        first = np.unique(pairs.data.column("example").to_numpy(), return_index=True)[1]
        if len(first) < FEWEST_PROMPTS:
            if trainer.is_world_process_zero():
                say(f"{len(first)} held-out prompts are too few to check whether the model became worse")
            return
        # All pairs in the same rounds as under the opponent: an unchanged model has exactly the same log-probs.
        after = torch.full_like(trainer.opponent["eval"], torch.nan)
        score_pairs(trainer, trainer.model_wrapped, pairs, after, title="held-out pairs")
        real = response_indices(torch.from_numpy(first))[0]
        tokens = torch.from_numpy(list_value_length(pairs.data.column("real")).to_numpy()[first])
        before, after = trainer.opponent["eval"].cpu()[real], after.cpu()[real]
        if not after.isfinite().all():
            raise SpinError(
                "the trained model's log-probs of held-out responses are not finite: training diverged; remove the "
                "iteration with `axolotl spin reset` and lower the learning_rate"
            )
        trainer.task.record_held_out(compare(before / tokens, after / tokens))


class RealRewardWatch:
    """Warns once an iteration that `spin/reward_real` stays below 0."""

    def __init__(self, logged: Iterable[Mapping[str, Any]]) -> None:
        """`logged` is the log up to the checkpoint that training resumes from: what it shows was warned of before."""
        self.entries: list[Mapping[str, Any]] = []
        self.warned = False
        for entry in logged:
            self.warned = self.warned or self._add(entry) is not None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of the training log."""
        if not self.warned and (mean := self._add(entry)) is not None:
            self.warned = True
            warn(
                f"spin/reward_real has been below 0 for the last {WINDOW:g} epochs (mean {mean:.4f}): real responses "
                f"become less likely; {REMEDIES}"
            )

    def _add(self, entry: Mapping[str, Any]) -> float | None:
        if "spin/reward_real" not in entry:
            return None
        self.entries.append(entry)
        return negative_real_reward(self.entries)
