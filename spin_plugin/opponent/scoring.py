"""Scoring the pairs: which rank scores which of them, in rounds of batches, and what is left to score."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spin_plugin.console import SpinError
from spin_plugin.model.layout import response_numbers
from spin_plugin.opponent.store import OpponentStore

SCORING_FACTOR = 4  # without gradients this many times the tokens fit into memory


def scoring_tokens(lengths: Tensor, *, micro_batch: int) -> int:
    """Tokens that are scored at a time on one rank, by the training pairs' `lengths` [N].

    Whatever the order of training, one of its micro-batches holds the longest pair, and one no less than the mean.
    """
    largest = max(int(lengths.max()), micro_batch * int(lengths.sum()) // len(lengths))
    return SCORING_FACTOR * largest


def scoring_batches(lengths: Tensor, *, tokens: int, world: int) -> list[Tensor]:
    """Rounds of [world, n] pair indices: what each rank scores in each round, equally many pairs for all.

    The longest pairs go first and pairs of like length together, so that little of a batch is padding. A last round
    of fewer pairs than ranks takes the next longer ones as well, each alone: they are scored twice.

    Args:
        lengths: [N] tokens of every pair.
        tokens: what n pairs hold at most, each counted as the longest of them, as they may be padded to it; one pair
            alone may hold more.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    rounds, first = [], 0
    while first < len(order):
        size = max(1, min(tokens // int(lengths[order[first]]), (len(order) - first) // world))
        places = torch.arange(world * size) + min(first, len(order) - world * size)
        rounds.append(order[places % len(order)].view(world, size))
        first += world * size
    return rounds


Score = Callable[[Tensor], tuple[Tensor, Tensor]]
"""One round's [world, batch] pair indices to the numbers and log-probabilities [n] of their responses, of all ranks."""


def unscored(rounds: list[Tensor], values: Tensor) -> list[Tensor]:
    """The rounds in which a value is still NaN, whole: a pair's value depends a little on the batch it is in."""
    absent = values.isnan().cpu()
    return [indices for indices in rounds if absent[response_numbers(indices)].any()]


def fill(values: Tensor, store: OpponentStore, rounds: Iterable[Tensor], score: Score, *, write: bool) -> None:
    """Compute `values` [R], round by round and in place; where `write` says so, store them a part at a time.

    Raises:
        SpinError: a log-probability is NaN or infinite.
    """
    unstored = 0
    for indices in rounds:
        responses, logps = score(indices)
        if not torch.isfinite(logps).all():
            raise SpinError(
                "the opponent gives log-probabilities that are not finite: its weights are damaged, or its numbers "
                "overflow (`fp16`); restore them, or use bf16"
            )
        values[responses] = logps.float()
        unstored += len(responses)
        if write and unstored >= store.part:
            store.save(values)
            unstored = 0
    assert not values.isnan().any()
    if write:
        store.save(values)
