"""The opponent's log-probabilities: computed once an iteration by the policy before its first step, then stored.

At that moment the policy *is* the opponent, so no second model is ever in memory; after a resume the
stored values are the only source, because the policy has moved on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spin_plugin.messages import SpinError

Score = Callable[[Sequence[int]], Tensor]
"""Indices of n pairs to their [2, n] log-probabilities."""


class OpponentStore:
    """[2, N] fp32 log-probabilities of one split's N pairs, row 0 real and row 1 synthetic responses."""

    def __init__(self, file: Path, pairs: int) -> None:
        self.file, self.pairs = file, pairs

    def exists(self) -> bool:
        return self.file.exists()

    def load(self) -> Tensor:
        """The stored values.

        Raises:
            SpinError: the file is damaged or belongs to other pairs.
        """
        try:
            values = load_file(self.file)["logps"]
        except (SafetensorError, KeyError, OSError) as error:
            raise SpinError(
                f"{self.file} is damaged ({error}); delete the iteration's checkpoints and this file"
            ) from None
        if values.shape != (2, self.pairs) or not torch.isfinite(values).all():
            raise SpinError(
                f"{self.file} does not hold a value for each of the {self.pairs:,} pairs; delete it and the "
                "checkpoints of this iteration, then run the same command again"
            )
        return values

    def save(self, values: Tensor) -> None:
        """Store values of shape [2, N] in one step.

        Raises:
            SpinError: a log-probability is not finite, so the opponent's weights are broken.
        """
        assert values.shape == (2, self.pairs)
        if not torch.isfinite(values).all():
            raise SpinError("the opponent gives log-probabilities that are not finite: its weights are damaged")
        temporary = self.file.with_suffix(".tmp")
        save_file({"logps": values.contiguous()}, temporary)
        temporary.replace(self.file)


def shares(lengths: Tensor, *, batch: int, rank: int, world: int) -> list[list[int]]:
    """The batches of pair indices that one rank scores; all ranks get equally many of equal size.

    Pairs of like length go together, so that little of a batch is padding. The last batches are filled
    up with pairs from the front, which are then scored twice with the same result.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    rounds = -(-len(order) // (batch * world))
    filled = order[torch.arange(rounds * batch * world) % len(order)]
    return filled.view(rounds, world, batch)[:, rank].tolist()
