"""The pairs that show what a model does with the data, and how far apart two answers may be."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spin_plugin.model.layout import Pair

ROW = 300
"""Tokens of a row that is several of the attention's blocks long."""
SHORT_ROW = 12
"""Pairs in a row at most, where so many of them have fewer tokens than `ROW`."""


# --- the pairs that are compared -----------------------------------------------------------------


def probe(lengths: Tensor, pair: Callable[[int], Pair], longest: int | None = None) -> list[list[Pair]]:
    """A few rows of pairs that show what a model does with the data; the same on every rank.

    Args:
        lengths: [N] tokens of every pair, its prompt counted once.
        pair: the pair of an index.
        longest: tokens of the longest prompt and response together that the data may have, if known.

    Returns:
        First a row of several blocks with as few tokens as there are, which is also used for gradients; then the
        shortest pair, a row of several pairs, and one whose sequence is as long as the data's longest.
    """
    enough = torch.where(lengths >= ROW, lengths, torch.iinfo(lengths.dtype).max)
    together = int((lengths[:SHORT_ROW].cumsum(0) < ROW).sum()) + 1
    several = [pair(index) for index in range(min(len(lengths), max(3, min(together, SHORT_ROW))))]
    blocks = [pair(int(enough.argmin()))] if (lengths >= ROW).any() else several
    rows = [blocks, [pair(int(lengths.argmin()))], [_stretched(pair(int(lengths.argmax())), longest)]]
    return rows if blocks is several else [*rows, several]


def _stretched(pair: Pair, longest: int | None) -> Pair:
    """The pair with both responses as the first: no sequence of the data is longer, so no window is overlooked."""
    room = None if longest is None else max(1, longest - len(pair.prompt))
    return pair._replace(real=[*pair.real, *pair.synthetic][:room])


class Apart(NamedTuple):
    """How far log-probabilities are from those of one sequence at a time, in nats; of the worst response."""

    rounding: float
    """Divided by the root of the response's tokens: errors of rounding add up like that, a fault like the tokens."""
    a_token: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor, lengths: Tensor) -> "Apart":
        """The worst of [R] log-probabilities with [R] tokens; what is not a number is infinitely far."""
        far = (found - expected).abs().nan_to_num(torch.inf, torch.inf)
        return max(cls(*one) for one in zip((far / lengths.sqrt()).tolist(), (far / lengths).tolist(), strict=True))


class Tolerance(NamedTuple):
    """What rounding explains, for `Apart.rounding` and for the relative difference of gradients."""

    least: float
    """Never a fault. A head and a flat row may also be three times as far off as the padded form."""
    most: float
    """Always a fault."""
    gradient: float


EXACT = Tolerance(1e-3, 1e-3, 1e-3)
ROUGH = Tolerance(0.25, 1.0, 0.3)  # 16 bits: 0.05 a token is common, more where an expert is chosen otherwise
