"""Warn when real responses become less likely: at the end of training on held-out prompts, before that from the log."""

import math
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
        trainer, found = self.trainer, self.trainer.task.pairs
        pairs, rows = found.eval, found.held_out_rows
        if pairs is None:
            return
        # A prompt's real response counts once, however many pairs it has.
        examples, first = np.unique(pairs.data.column("example").to_numpy(), return_index=True)
        rows = None if rows is None else rows[torch.from_numpy(examples)]
        if len(first if rows is None else rows.unique()) < FEWEST_PROMPTS:
            if trainer.is_world_process_zero():
                say(f"{len(first)} held-out prompts are too few to check whether the model became worse")
            return
        # All pairs in the same rounds as under the opponent, so that rounding does not differ either.
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
        trainer.task.record("held_out", compare(before / tokens, after / tokens, rows).as_dict())


class RealRewardWatch:
    """Warns once an iteration that `spin/reward_real` stays below 0."""

    def __init__(self, logged: Iterable[Mapping[str, Any]]) -> None:
        """`logged` is the log up to the checkpoint that training resumes from; what it shows was already reported."""
        self.entries = [entry for entry in logged if _has_reward(entry)]
        self.warned = negative_real_reward(self.entries) is not None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of the training log."""
        if self.warned or not _has_reward(entry):
            return
        self.entries.append(entry)
        if (mean := negative_real_reward(self.entries)) is not None:
            self.warned = True
            warn(
                f"the mean of spin/reward_real over the last {WINDOW:g} epochs is {mean:.4f}: real responses become "
                f"less likely; {REMEDIES}"
            )


def _has_reward(entry: Mapping[str, Any]) -> bool:
    return math.isfinite(entry.get("spin/reward_real", math.nan))
