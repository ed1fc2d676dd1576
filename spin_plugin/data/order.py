"""The order of the pairs in an epoch: random, with the micro-batches of a step balanced by tokens.

The micro-batches of an epoch are dealt to the ranks in turn, and a step takes so many from each. So that all ranks
have equally many, accelerate fills up the last ones with pairs from the epoch's beginning, which must not count twice.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


def balanced(chunk: Tensor, lengths: Tensor, groups: int) -> Tensor:
    """Reorder one optimizer step's pairs so that its micro-batches hold about equally many tokens.

    The pairs of the step stay the same and every micro-batch keeps its size, so the mean gradient is unchanged;
    what changes is the largest micro-batch, which decides over memory and over how long ranks wait for each other.

    Args:
        chunk: [groups * size] pair indices of one step, over all ranks and accumulation steps.
        lengths: [N] tokens of every pair.
        groups: micro-batches in the step.
    """
    size = len(chunk) // groups
    filled: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    # The longest pair that is left goes to the group with the fewest tokens that still has room.
    for place in torch.argsort(lengths[chunk], descending=True, stable=True).tolist():
        group = min((g for g in range(groups) if len(filled[g]) < size), key=tokens.__getitem__)
        filled[group].append(place)
        tokens[group] += int(lengths[chunk[place]])
    return chunk[torch.tensor(filled).flatten()]


def steps_in_epoch(pairs: int, *, micro_batch: int, ranks: int, accumulated: int) -> int:
    """Optimizer steps that play every one of so many pairs once, as transformers counts them."""
    return max(1, math.ceil(math.ceil(pairs / (micro_batch * ranks)) / accumulated))


def counted(pairs: int, *, number: int, micro_batch: int, rank: int, ranks: int) -> int:
    """How many pairs of a rank's micro-batch `number` count; from 0 in every epoch. Those that fill it up come last."""
    start = (number * ranks + rank) * micro_batch
    return min(micro_batch, max(0, pairs - start))


class BalancedSampler(Sampler[int]):
    """A seeded random order, the same on every rank, balanced within each optimizer step."""

    def __init__(self, lengths: Tensor, *, micro_batch: int, groups: int, seed: int) -> None:
        self.lengths, self.micro_batch, self.groups, self.seed = lengths, micro_batch, groups, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of every epoch, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for chunk in order.split(self.micro_batch * self.groups):
            whole = len(chunk) == self.micro_batch * self.groups  # an epoch's last step may be short
            yield from (balanced(chunk, self.lengths, self.groups) if whole else chunk).tolist()
