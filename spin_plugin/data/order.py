"""Random order of the pairs in an epoch, with the micro-batches of each step balanced by tokens.

accelerate assigns an epoch's micro-batches to the ranks in turn. To give every rank the same number, it fills the last
ones with pairs from the beginning of the epoch, which must not be counted twice.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from datasets import Dataset
from pyarrow.compute import list_value_length
from torch import Tensor
from torch.utils.data import Sampler


class Sizes(NamedTuple):
    """What the order depends on: [N] each, one entry per pair."""

    tokens: Tensor
    """Tokens of the prompt and both responses."""
    shared: Tensor
    """Of these, the tokens of the prompt and the real response."""
    prompts: Tensor
    """Equal numbers mark pairs that stand together and share these tokens; all differ if pairs are not grouped."""


def pair_sizes(pairs: Dataset, *, grouped: bool) -> Sizes:
    """Return the sizes of all pairs in a dataset.

    Args:
        pairs: with the columns of `table.PAIR_SCHEMA`.
        grouped: whether pairs of one prompt stand together.
    """
    columns = pairs.select_columns(["length", "example", "synthetic"]).with_format("arrow")[:]
    tokens, prompts = (torch.tensor(columns[name].to_numpy()) for name in ("length", "example"))
    synthetic = torch.tensor(list_value_length(columns["synthetic"]).to_numpy())
    return Sizes(tokens, tokens - synthetic, prompts if grouped else torch.arange(len(tokens)))


def balanced(chunk: Tensor, sizes: Sizes, groups: int) -> Tensor:
    """Reorder the pairs of one optimizer step so that its micro-batches hold about the same number of tokens.

    The step keeps its pairs and every micro-batch its size, so the mean gradient does not change. The largest
    micro-batch shrinks, which saves memory and time that ranks wait for each other. Pairs of one prompt stay in one
    micro-batch where one has space for them.

    Args:
        chunk: [groups * size] pair indices of one step, over all ranks and accumulation steps.
        sizes: of all pairs.
        groups: number of micro-batches in the step.
    """
    size = len(chunk) // groups
    tokens, shared, prompts = (column[chunk].tolist() for column in sizes)

    def row_tokens(part: list[int]) -> int:
        return sum(tokens[place] for place in part) - sum(shared[place] for place in part[1:])

    runs = [list(run) for _, run in groupby(range(len(chunk)), key=prompts.__getitem__)]
    parts = [run[first : first + size] for run in runs for first in range(0, len(run), size)]
    filled: list[list[int]] = [[] for _ in range(groups)]
    loads = [0] * groups
    # Greedy: the longest remaining part goes to the micro-batch with the fewest tokens among those that can hold it.
    for part in sorted(parts, key=row_tokens, reverse=True):
        left = part
        while left:
            fitting = [group for group in range(groups) if len(filled[group]) + len(left) <= size]
            if fitting:
                group = min(fitting, key=loads.__getitem__)
            else:  # split the part
                group = min(range(groups), key=lambda group: len(filled[group]))
            space = size - len(filled[group])
            taken, left = left[:space], left[space:]
            filled[group] += taken
            loads[group] += row_tokens(taken)
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
    """Sample in a seeded random order of prompts, the same on every rank, balanced within each optimizer step."""

    def __init__(self, sizes: Sizes, *, micro_batch: int, groups: int, seed: int) -> None:
        self.sizes, self.micro_batch, self.groups, self.seed = sizes, micro_batch, groups, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.sizes.tokens)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls this at the start of every epoch, also after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = shuffled(self.sizes.prompts, generator)
        for chunk in order.split(self.micro_batch * self.groups):
            complete = len(chunk) == self.micro_batch * self.groups  # the last step of an epoch can be shorter
            yield from (balanced(chunk, self.sizes, self.groups) if complete else chunk).tolist()


def shuffled(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Return the [N] pair indices in a random order of prompts, the pairs of each together and in their own order."""
    numbers, pairs = prompts.unique(return_inverse=True)
    place = torch.empty(len(numbers), dtype=torch.long)
    place[torch.randperm(len(numbers), generator=generator)] = torch.arange(len(numbers))
    return place[pairs].argsort(stable=True)
