"""The training batches of a rank: for every optimizer step, its share of the micro-batches.

transformers takes `gradient_accumulation_steps` items per step from the data loader. Here an item holds any number of
micro-batches, because their number varies: a micro-batch holds whole prompts or a number of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.utils.data
from datasets import Dataset
from torch.utils.data import Sampler

from spin_plugin.config.specs import TrainingSpec
from spin_plugin.data.order import Limits, Sizes, micro_batches


class MicroBatch(NamedTuple):
    """Pairs that the model computes at once."""

    pairs: list[int]
    counts: bool = True
    """False if it only fills up a rank: all ranks take part in the same number of forwards."""


class Item(NamedTuple):
    """One item of the data loader."""

    micro_batches: list[MicroBatch]
    step_pairs: int
    """Pairs of the whole step, over all ranks."""


def steps_in_epoch(pairs: int, pairs_per_step: int) -> int:
    """Return the number of optimizer steps in an epoch."""
    return math.ceil(pairs / pairs_per_step)


def optimizer_steps(training: TrainingSpec, pairs: int) -> int:
    """Return the number of optimizer steps in an iteration that trains on `pairs` pairs."""
    pairs_per_step = training.micro_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = math.ceil(training.num_epochs * steps_in_epoch(pairs, pairs_per_step))
    return min(steps, training.max_steps or steps)


class StepSampler(Sampler[Item]):
    """Yield the items of one rank.

    Args:
        sampler: the order of the pairs, the same on every rank; accelerate sets the epoch of the attribute `sampler`.
        sizes: of all pairs.
        limits: of a micro-batch.
        accumulation: items per step.
        rank: this rank.
        ranks: number of ranks.
        balance: let micro-batches have about equally many tokens.
    """

    def __init__(
        self, sampler: Sampler[int], sizes: Sizes, limits: Limits, *, accumulation: int, rank: int, ranks: int,
        balance: bool,
    ) -> None:  # fmt: skip
        self.sampler, self.sizes, self.limits, self.balance = sampler, sizes, limits, balance
        self.accumulation, self.rank, self.ranks = accumulation, rank, ranks
        self.pairs_per_step = limits.pairs * accumulation * ranks
        together = sizes.prompts.unique().numel() < len(sizes.prompts)
        self._separate = not together and limits.tokens is None

    def __len__(self) -> int:
        return steps_in_epoch(len(self.sizes.tokens), self.pairs_per_step) * self.accumulation

    def __iter__(self) -> Iterator[Item]:
        order = list(self.sampler)
        for first in range(0, len(order), self.pairs_per_step):
            step = order[first : first + self.pairs_per_step]
            share = self._share(step)
            for number in range(self.accumulation):
                # never empty for the last item, after which the optimizer steps
                start, end = (len(share) * place // self.accumulation for place in (number, number + 1))
                yield Item(share[start:end], len(step))

    def _share(self, step: list[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step, as many as every other rank's."""
        # Separate pairs keep the order of versions that could not group them, also in an epoch's last, shorter step.
        balance = self.balance and not (self._separate and len(step) < self.pairs_per_step)
        found = micro_batches(step, self.sizes, self.limits, ranks=self.ranks, balance=balance)
        share = [MicroBatch(pairs) for pairs in found[self.rank :: self.ranks]]
        if len(share) * self.ranks < len(found):
            shortest = min(step, key=lambda pair: int(self.sizes.tokens[pair]))
            share.append(MicroBatch([shortest], counts=False))
        return share


class StepDataset(torch.utils.data.Dataset[Any]):
    """The pairs, collated into micro-batches.

    Args:
        pairs: the training pairs.
        collate: the collator of one micro-batch.
    """

    def __init__(self, pairs: Dataset, collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.pairs, self.collate = pairs, collate

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, item: Item) -> dict[str, Any]:
        """Return `step_pairs` and the collated micro-batches, each with the number of pairs that are `counted`."""
        batches = [
            self.collate(self.pairs.__getitems__(batch.pairs)) | {"counted": len(batch.pairs) * batch.counts}
            for batch in item.micro_batches
        ]
        return {"step_pairs": item.step_pairs, "micro_batches": batches}


def unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    """The data loader's collate function: `StepDataset` has collated already."""
    return batch
