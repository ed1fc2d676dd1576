"""The opponent's log-probabilities: computed once an iteration by the policy before its first step, then stored.

At that moment the policy *is* the opponent, so no second model is ever in memory; after a resume the
stored values are the only source, because the policy has moved on.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spin_plugin.messages import SpinError
from spin_plugin.run import write_whole

PARTS = 64  # the file is written so often while the values are computed
FEW = 512  # pairs that are not worth a write of their own


class OpponentStore:
    """[2, N] fp32 log-probabilities of one split's N pairs, row 0 real and row 1 synthetic responses.

    One file, always whole: NaN stands for what has not been computed yet.
    """

    def __init__(self, file: Path, pairs: int, key: str) -> None:
        """`key` is what the values depend on: values stored under another one are never used."""
        self.file, self.pairs, self.key = file, pairs, key

    @property
    def part(self) -> int:
        """How many pairs may be computed without being stored: what can be lost at most when a run is killed."""
        return max(FEW, self.pairs // PARTS)

    def load(self) -> Tensor:
        """The stored values; NaN where there are none of this opponent and these pairs."""
        nothing = torch.full((2, self.pairs), torch.nan)
        try:
            with safe_open(self.file, framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return nothing
                values = stored.get_tensor("logps")
        except (SafetensorError, OSError):  # absent or damaged
            return nothing
        return values if values.shape == nothing.shape else nothing

    def save(self, values: Tensor) -> None:
        """Replace the stored values, of shape [2, N], in one step."""
        assert values.shape == (2, self.pairs)
        write_whole(self.file, save({"logps": values.cpu().contiguous()}, metadata={"key": self.key}))


def shares(lengths: Tensor, *, batch: int, world: int) -> Tensor:
    """[rounds, world, batch] pair indices: what each rank scores in each round, equally many for all.

    Pairs of like length go together, so that little of a batch is padding. The last batches are filled
    up with pairs from the front, which are then scored twice with the same result.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    rounds = -(-len(order) // (batch * world))
    filled = order[torch.arange(rounds * batch * world) % len(order)]
    return filled.view(rounds, world, batch)


Score = Callable[[Tensor], tuple[Tensor, Tensor]]
"""One round's [world, batch] pair indices to n indices and their [2, n] log-probabilities, those of all ranks."""


def missing(rounds: Tensor, values: Tensor) -> Tensor:
    """The rounds in which a value is still NaN, whole: a pair's value depends a little on the batch it is in."""
    return rounds[values.isnan().any(0).cpu()[rounds].flatten(1).any(1)]


def fill(values: Tensor, store: OpponentStore, rounds: Iterable[Tensor], score: Score, *, write: bool) -> None:
    """Compute `values`, round by round and in place; where `write` says so, store them a part at a time.

    Raises:
        SpinError: a log-probability is NaN or infinite.
    """
    unstored = 0
    for indices in rounds:
        index, logps = score(indices)
        if not torch.isfinite(logps).all():
            raise SpinError(
                "the opponent gives log-probabilities that are not finite: its weights are damaged, or its numbers "
                "overflow (`fp16`); restore them, or use bf16"
            )
        values[:, index] = logps.float()
        unstored += len(index)
        if write and unstored >= store.part:
            store.save(values)
            unstored = 0
    assert not values.isnan().any()
    if write:
        store.save(values)
