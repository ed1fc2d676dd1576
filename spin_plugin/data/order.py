"""Random order of the pairs in an epoch, with the micro-batches of each step balanced by tokens.

accelerate assigns an epoch's micro-batches to the ranks in turn. To give every rank the same number, it fills the last
ones with pairs from the beginning of the epoch, which must not be counted twice.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


def balanced(chunk: Tensor, lengths: Tensor, groups: int) -> Tensor:
    """Reorder the pairs of one optimizer step so that its micro-batches hold about the same number of tokens.

    The step keeps its pairs and every micro-batch its size, so the mean gradient does not change. The largest
    micro-batch shrinks, which saves memory and time that ranks wait for each other.

    Args:
        chunk: [groups * size] pair indices of one step, over all ranks and accumulation steps.
        lengths: [N] tokens of every pair.
        groups: number of micro-batches in the step.
    """
    size = len(chunk) // groups
    filled: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    # Greedy: the longest remaining pair goes to the non-full group with the fewest tokens.
    for place in torch.argsort(lengths[chunk], descending=True, stable=True).tolist():
        group = min((g for g in range(groups) if len(filled[g]) < size), key=tokens.__getitem__)
        filled[group].append(place)
        tokens[group] += int(lengths[chunk[place]])
    return chunk[torch.tensor(filled).flatten()]


def steps_in_epoch(pairs: int, *, micro_batch: int, ranks: int, accumulation: int) -> int:
    """Return the number of optimizer steps in an epoch, counted like transformers."""
    return max(1, math.ceil(math.ceil(pairs / (micro_batch * ranks)) / accumulation))


def pairs_counted(pairs: int, *, number: int, micro_batch: int, rank: int, ranks: int) -> int:
    """Return how many pairs of a rank's micro-batch are not fill-up pairs; those come last.

    Args:
        pairs: pairs in the epoch.
        number: the micro-batch's number on this rank, starting at 0 in every epoch.
        micro_batch: pairs per micro-batch.
        rank: this rank.
        ranks: number of ranks.
    """
    start = (number * ranks + rank) * micro_batch
    return min(micro_batch, max(0, pairs - start))


class BalancedSampler(Sampler[int]):
    """Sample in a seeded random order, the same on every rank, balanced within each optimizer step."""

    def __init__(self, lengths: Tensor, *, micro_batch: int, groups: int, seed: int) -> None:
        self.lengths, self.micro_batch, self.groups, self.seed = lengths, micro_batch, groups, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls this at the start of every epoch, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for chunk in order.split(self.micro_batch * self.groups):
            complete = len(chunk) == self.micro_batch * self.groups  # the last step of an epoch can be shorter
            yield from (balanced(chunk, self.lengths, self.groups) if complete else chunk).tolist()
