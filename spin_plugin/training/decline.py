"""After the last step: score the held-out pairs with the trained model, compare it with the opponent and with p_0."""

import math
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from pyarrow.compute import list_value_length
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin_plugin.console import SpinError, exit_on_error, say
from spin_plugin.model.layout import response_indices
from spin_plugin.objective.decline import FEWEST_PROMPTS, compare, divergence, row_means
from spin_plugin.opponent.store import OpponentStore, RewardStore
from spin_plugin.run.directory import RunDir
from spin_plugin.training.prepare import open_pairs
from spin_plugin.training.scorer import score_pairs


class HeldOutCheck(TrainerCallback):
    """Compares the trained model with the opponent on held-out prompts, and with the run's first opponent.

    It must follow the callbacks that change the weights at the end of training. If the run is killed before the
    iteration is finished, training resumes without a step left and ends here again.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a SpinTrainer, whose module imports this one

    @exit_on_error
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pairs = self.trainer.task.pairs.eval
        if pairs is None:
            return
        # All pairs in the same rounds as under the opponent, so that rounding does not differ either.
        before, after = self.trainer.opponent["eval"].cpu(), self._score(pairs, "held-out pairs")
        if not after.isfinite().all():
            raise SpinError(
                "the trained model's log-probs of held-out responses are not finite: training diverged; remove the "
                "iteration with `axolotl spin reset` and lower the learning_rate"
            )
        self._compare_real(pairs, before, after)
        self._record_rewards(pairs, before, after)
        self._record_divergence(pairs, before, after)

    def _score(self, pairs: Dataset, title: str) -> Tensor:
        """Return the trained model's [2N] log-probs of N pairs."""
        values = torch.full((2 * len(pairs),), torch.nan, device=self.trainer.args.device)
        score_pairs(self.trainer, self.trainer.model_wrapped, pairs, values, title=title)
        return values.cpu()

    def _compare_real(self, pairs: Dataset, before: Tensor, after: Tensor) -> None:
        """Record the change of the real responses' log-probs per token."""
        rows = self.trainer.task.pairs.held_out_rows
        # A prompt's real response counts once, however many pairs it has.
        examples, first = np.unique(pairs.data.column("example").to_numpy(), return_index=True)
        rows = None if rows is None else rows[torch.from_numpy(examples)]
        if len(first if rows is None else rows.unique()) < FEWEST_PROMPTS:
            if self.trainer.is_world_process_zero():
                say(f"{len(first)} held-out prompts are too few to check whether the model became worse")
            return
        real = response_indices(torch.from_numpy(first))[0]
        tokens = torch.from_numpy(list_value_length(pairs.data.column("real")).to_numpy()[first])
        self.trainer.task.record("held_out", compare(before[real] / tokens, after[real] / tokens, rows).as_dict())

    def _record_rewards(self, pairs: Dataset, before: Tensor, after: Tensor) -> None:
        """Store each held-out pair's rewards, and record their means and the standard error of the mean margin."""
        trainer = self.trainer
        rewards = trainer.task.spin.beta * (after - before).view(-1, 2)
        if trainer.is_world_process_zero():
            store = RewardStore(trainer.task.directory.rewards("eval"), len(rewards), trainer.pair_keys["eval"])
            store.save(rewards)
        real, synthetic = rewards.double().unbind(1)
        means = {
            "reward_real": real,
            "reward_synthetic": synthetic,
            "reward_margin": real - synthetic,
            "accuracy": (real > synthetic).double(),
        }
        found = {name: float(values.mean()) for name, values in means.items()}
        examples, rows = torch.tensor(pairs.data.column("example").to_numpy()), trainer.task.pairs.held_out_rows
        margins = row_means(real - synthetic, examples if rows is None else rows[examples])
        if len(margins) > 1:
            found["margin_error"] = float(margins.std()) / math.sqrt(len(margins))
        trainer.task.record("held_out_pairs", found)

    def _record_divergence(self, pairs: Dataset, before: Tensor, after: Tensor) -> None:
        """Record KL(p_0 || p_theta), the divergence of the trained model from the run's first opponent."""
        task = self.trainer.task
        if task.number:
            stored = _first_opponent(task.run)
            if not all(gather_object([stored is not None])):  # all ranks must agree, whatever each of them sees
                return
            assert stored is not None
            pairs, before = stored
            after = self._score(pairs, "divergence")
        tokens = torch.tensor(list_value_length(pairs.data.column("synthetic")).to_numpy())
        task.record("divergence", divergence(before.view(-1, 2)[:, 1], after.view(-1, 2)[:, 1], tokens))


def _first_opponent(run: RunDir) -> tuple[Dataset, Tensor] | None:
    """Return iteration 0's N held-out pairs and their [2N] log-probs under its opponent.

    None if they are deleted, as the user may, damaged or of another version: what was trained must not be lost for it.
    """
    try:
        first = open_pairs(run.iteration(0))
        if first.eval is None:
            return None
        store = OpponentStore(first.opponent_files["eval"], 2 * len(first.eval), first.opponent_key("eval"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    logps = store.load()
    return None if logps.isnan().any() else (first.eval, logps)
