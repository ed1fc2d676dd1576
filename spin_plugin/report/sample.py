"""Which prompts the grid shows: no run of 50,000 pairs fits into a page."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PromptStats:
    """What the sort orders of the grid compare: N prompts, those of training first, then the held-out ones."""

    asked: NDArray[np.bool_]
    """[N] whether any iteration has a pair with the prompt."""
    held_out: NDArray[np.bool_]
    """[N]"""
    lowest_real: Floats
    """[N] the lowest reward of its real response in any iteration; NaN if unknown."""
    lowest_margin: Floats
    """[N] the lowest reward margin of its pairs in any iteration; NaN if unknown."""
    longest: NDArray[np.int64]
    """[N] tokens of its longest synthetic response."""

    @classmethod
    def empty(cls, trained: int, held_out: int) -> "PromptStats":
        """Return the statistics of prompts of which nothing is known yet."""
        number = trained + held_out
        return cls(
            asked=np.zeros(number, bool),
            held_out=np.arange(number) >= trained,
            lowest_real=np.full(number, np.nan),
            lowest_margin=np.full(number, np.nan),
            longest=np.zeros(number, np.int64),
        )

    def add_pairs(self, prompts: NDArray[np.int64], tokens: NDArray[np.int64], real: Floats, synthetic: Floats) -> None:
        """Take pairs into account.

        Args:
            prompts: [P] the prompt of each pair.
            tokens: [P] length of the synthetic response.
            real: [P] reward of the real response, NaN if unknown.
            synthetic: [P] reward of the synthetic response, NaN if unknown.
        """
        self.asked[prompts] = True
        np.maximum.at(self.longest, prompts, tokens)
        np.fmin.at(self.lowest_real, prompts, real)
        np.fmin.at(self.lowest_margin, prompts, real - synthetic)


def choose_prompts(stats: PromptStats, count: int, seed: int = 0) -> list[int]:
    """Choose up to `count` prompts, in turn from the extremes of each sort order, the held-out ones and all of them.

    The first ones of the result are therefore a fair sample too.
    """
    asked = np.flatnonzero(stats.asked)
    shuffled = np.random.default_rng(seed).permutation(asked)
    orders = [
        _ascending(stats.lowest_real, asked),
        _ascending(stats.lowest_margin, asked),
        _ascending(-stats.longest.astype(float), asked),
        shuffled[stats.held_out[shuffled]],
        shuffled,
    ]
    # The last order contains every prompt, so together they reach `count` if there are as many.
    ranked = (int(order[rank]) for rank in range(len(asked)) for order in orders if rank < len(order))
    return list(islice(_distinct(ranked), count))


def _distinct(numbers: Iterator[int]) -> Iterator[int]:
    seen: set[int] = set()
    for number in numbers:
        if number not in seen:
            seen.add(number)
            yield number


def _ascending(values: Floats, among: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those with a known value, lowest first."""
    known = among[~np.isnan(values[among])]
    return known[np.argsort(values[known], kind="stable")]
