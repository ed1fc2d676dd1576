"""Scoring: which rank scores which pairs, in rounds of batches, and which rounds are left."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spin_plugin.console import SpinError
from spin_plugin.data.order import Limits, Sizes
from spin_plugin.model.layout import response_indices
from spin_plugin.opponent.store import OpponentStore

SCORING_FACTOR = 4  # without gradients, this many times the tokens fit in memory


def scoring_tokens(lengths: Tensor, limits: Limits) -> int:
    """Return how many tokens a rank scores at a time, from the training pairs' `lengths` [N].

    Whatever the training order, one micro-batch holds the longest pair, and one at least the mean number of tokens.
    """
    usual = limits.tokens or limits.pairs * int(lengths.sum()) // len(lengths)
    largest = max(int(lengths.max()), usual)
    return SCORING_FACTOR * largest


def scoring_batches(lengths: Tensor, *, tokens: int, world: int) -> list[Tensor]:
    """Return rounds of [world, n] pair indices: in each round every rank scores n pairs.

    The longest pairs come first, and pairs of similar length together to limit padding. If fewer pairs than ranks are
    left, the last round also takes the next longer ones, one pair per rank: those are scored twice.

    Args:
        lengths: [N] tokens in each pair.
        tokens: the most tokens in n pairs, each counted as long as the longest because it can be padded to it; a
            single pair can exceed it.
        world: the number of ranks.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    rounds, first = [], 0
    while first < len(order):
        size = max(1, min(tokens // int(lengths[order[first]]), (len(order) - first) // world))
        places = torch.arange(world * size) + min(first, len(order) - world * size)
        rounds.append(order[places % len(order)].view(world, size))
        first += world * size
    return rounds


def scoring_rounds(sizes: Sizes, *, tokens: int, world: int) -> list[Tensor]:
    """Return rounds of [world, n] pair indices as `scoring_batches`, the pairs of one prompt together.

    Prompts with equally many pairs are scored together, so that all ranks score the same number of pairs. A pair
    counts with all its tokens, as in the padded layout; a prompt that has more than `tokens` is split.
    """
    by_prompt = sizes.prompts.argsort(stable=True)
    counts = sizes.prompts.unique(return_counts=True)[1]
    most = max(1, tokens // int(sizes.tokens.max()))  # pairs of a prompt that are scored together
    starts = (counts.cumsum(0) - counts).tolist()
    parts = [
        (start + offset, min(most, count - offset))
        for start, count in zip(starts, counts.tolist(), strict=True)
        for offset in range(0, count, most)
    ]
    first, counts = torch.tensor(parts).unbind(1)
    rounds = []
    for count in counts.unique().tolist():
        pairs = by_prompt[first[counts == count][:, None] + torch.arange(count)]  # [parts, count]
        part_tokens = sizes.tokens[pairs].sum(1)
        rounds += [pairs[chosen].flatten(1) for chosen in scoring_batches(part_tokens, tokens=tokens, world=world)]
    return rounds


Score = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps a round's [world, n] pair indices to the storage indices and log-probs of their responses, from all ranks."""


def unscored(rounds: list[Tensor], values: Tensor) -> list[Tensor]:
    """Return the rounds with a NaN value, entire: a pair's value depends slightly on the batch it is in."""
    absent = values.isnan().cpu()
    return [indices for indices in rounds if absent[response_indices(indices)].any()]


def fill(values: Tensor, store: OpponentStore, rounds: Iterable[Tensor], score: Score, *, write: bool) -> None:
    """Compute `values` [R] in place, round by round; if `write`, store them at intervals.

    Raises:
        SpinError: a log-prob is NaN or infinite.
    """
    unstored = 0
    for indices in rounds:
        responses, logps = score(indices)
        if not torch.isfinite(logps).all():
            raise SpinError(
                "the opponent's log-probs are not finite: its weights are damaged or overflow in fp16; restore the "
                "weights, or use bf16"
            )
        values[responses] = logps.float()
        unstored += len(responses)
        if write and unstored >= store.part:
            store.save(values)
            unstored = 0
    assert not values.isnan().any()
    if write:
        store.save(values)
