"""The order of an epoch: a random order of prompts, cut into optimizer steps, and each step into micro-batches.

A step has a fixed number of pairs, whatever its micro-batches. Each micro-batch is one row of the model, so a step is
split into micro-batches of about equally many tokens.
"""

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from pyarrow.compute import list_value_length
from torch import Tensor
from torch.utils.data import Sampler


class Sizes(NamedTuple):
    """What the order depends on: [N] each, one entry per pair."""

    tokens: Tensor
    """Tokens of the prompt and all responses that are computed."""
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
    columns = pairs.select_columns(["length", "example", "prompt", "real"]).with_format("arrow")[:]
    tokens, prompts = (torch.tensor(columns[name].to_numpy()) for name in ("length", "example"))
    prompt, real = (torch.tensor(list_value_length(columns[name]).to_numpy()) for name in ("prompt", "real"))
    return Sizes(tokens, prompt + real, prompts if grouped else torch.arange(len(tokens)))


class EpochSampler(Sampler[int]):
    """A sampler whose generator depends on seed and epoch only: the same on every rank and after a resume."""

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls this at the start of every epoch, also after a resume."""
        self.epoch = epoch

    def generator(self) -> torch.Generator:
        """Return a new generator for this epoch."""
        return torch.Generator().manual_seed(self.seed + self.epoch)


class PromptSampler(EpochSampler):
    """Sample the pairs in a random order of prompts."""

    def __init__(self, prompts: Tensor, *, seed: int) -> None:
        super().__init__(seed)
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        yield from shuffled(self.prompts, self.generator()).tolist()


class SeededSampler(EpochSampler):
    """Let a sampler that draws from a generator, as that of `group_by_length`, use this one's."""

    def __init__(self, sampler: Any, *, seed: int) -> None:
        super().__init__(seed)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = self.generator()
        yield from self.sampler


def shuffled(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Return the [N] pair indices in a random order of prompts, the pairs of each together and in their own order."""
    numbers, pairs = prompts.unique(return_inverse=True)
    place = torch.empty(len(numbers), dtype=torch.long)
    place[torch.randperm(len(numbers), generator=generator)] = torch.arange(len(numbers))
    return place[pairs].argsort(stable=True)


class Limits(NamedTuple):
    """How much a micro-batch holds."""

    pairs: int
    """Pairs, rounded up to whole prompts."""
    tokens: int | None = None
    """Tokens; then `pairs` is no limit, and a prompt with more tokens is split."""


def micro_batches(step: list[int], sizes: Sizes, limits: Limits, *, ranks: int, balance: bool) -> list[list[int]]:
    """Split the pairs of one step into micro-batches, which the ranks take in turn.

    Args:
        step: pair indices.
        sizes: of all pairs.
        limits: of a micro-batch.
        ranks: number of ranks.
        balance: give all micro-batches about equally many tokens; otherwise they keep the order of `step`.

    Returns:
        pair indices of each micro-batch, none empty.
    """
    tokens, shared, prompts = (dict(zip(step, column[step].tolist(), strict=True)) for column in sizes)

    def row_tokens(part: list[int]) -> int:
        return sum(tokens[pair] for pair in part) - sum(shared[pair] for pair in part[1:])

    parts = [list(run) for _, run in groupby(step, key=prompts.__getitem__)]
    if limits.tokens is not None:
        parts = [piece for part in parts for piece in _pieces(part, limits.tokens, row_tokens)]
    if not balance:
        return _in_order([(part, row_tokens(part)) for part in parts], limits)
    least = len(step) / limits.pairs if limits.tokens is None else sum(map(row_tokens, parts)) / limits.tokens
    number = ranks * math.ceil(least / ranks)
    # With fewer prompts than micro-batches, the last ranks would have none. Half a prompt is better.
    while len(parts) < number and len(parts) % ranks and len(longest := max(parts, key=len)) > 1:
        parts.remove(longest)
        parts += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    with_tokens = sorted(((part, row_tokens(part)) for part in parts), key=lambda part: part[1], reverse=True)
    while (found := _balanced(with_tokens, number, limits)) is None:
        number += ranks
    return found


def _pieces(part: list[int], limit: int, row_tokens: Callable[[list[int]], int]) -> list[list[int]]:
    """Split the pairs of a prompt into pieces of at most `limit` tokens; a single pair can have more."""
    pieces: list[list[int]] = []
    for pair in part:
        if pieces and row_tokens([*pieces[-1], pair]) <= limit:
            pieces[-1].append(pair)
        else:
            pieces.append([pair])
    return pieces


class _MicroBatch:
    """A micro-batch that is being filled."""

    def __init__(self) -> None:
        self.pairs: list[int] = []
        self.tokens = 0

    def fits(self, tokens: int, limits: Limits) -> bool:
        if limits.tokens is None:
            return len(self.pairs) < limits.pairs
        return not self.pairs or self.tokens + tokens <= limits.tokens

    def add(self, pairs: list[int], tokens: int) -> None:
        self.pairs += pairs
        self.tokens += tokens


def _in_order(parts: list[tuple[list[int], int]], limits: Limits) -> list[list[int]]:
    """Join consecutive parts, each with its tokens, into micro-batches."""
    filled = [_MicroBatch()]
    for pairs, tokens in parts:
        if not filled[-1].fits(tokens, limits):
            filled.append(_MicroBatch())
        filled[-1].add(pairs, tokens)
    return [batch.pairs for batch in filled]


def _balanced(parts: list[tuple[list[int], int]], number: int, limits: Limits) -> list[list[int]] | None:
    """Distribute parts, the longest first, over at most `number` micro-batches; None if they do not fit."""
    filled = [_MicroBatch() for _ in range(number)]
    for pairs, tokens in parts:
        # Greedy: to the micro-batch with the fewest tokens among those with space.
        fitting = [batch for batch in filled if batch.fits(tokens, limits)]
        if not fitting:
            return None
        min(fitting, key=lambda batch: batch.tokens).add(pairs, tokens)
    return [batch.pairs for batch in filled if batch.pairs]


def pairs_counted(pairs: int, *, number: int, micro_batch: int, rank: int, ranks: int) -> int:
    """Return how many pairs of a rank's evaluation batch are not fill-up pairs; those come last.

    accelerate gives every rank equally many batches and fills the last ones with pairs from the beginning.

    Args:
        pairs: pairs in the split.
        number: the batch's number on this rank, starting at 0.
        micro_batch: pairs per batch.
        rank: this rank.
        ranks: number of ranks.
    """
    start = (number * ranks + rank) * micro_batch
    return min(micro_batch, max(0, pairs - start))
