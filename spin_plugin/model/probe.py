"""Probe pairs for comparing the layouts, and the tolerances of that comparison."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spin_plugin.model.layout import Pair

MIN_ROW_TOKENS = 300
"""Tokens in a row that spans several attention blocks."""
MAX_ROW_PAIRS = 12
"""Most pairs in a row, even if it then has fewer than `MIN_ROW_TOKENS` tokens."""


# --- probe pairs ---------------------------------------------------------------------------------


def probe(
    lengths: Tensor, pair: Callable[[int], Pair], longest: int | None = None, *, grouped: bool = False
) -> list[list[Pair]]:
    """Select a few rows of pairs on which to compare the layouts; the same on every rank.

    Args:
        lengths: [N] tokens of every pair, its prompt counted once.
        pair: returns the pair at an index.
        longest: limit for the tokens of a prompt plus one response, if any.
        grouped: whether pairs of one prompt share a row.

    Returns:
        First a row as short as possible that spans several attention blocks, which is also used for gradients. Then
        the shortest pair, a pair with a sequence at least as long as any in the data, and, unless it is the first row,
        a row of several pairs. If `grouped`, a prompt with several synthetic responses comes first.
    """
    enough = torch.where(lengths >= MIN_ROW_TOKENS, lengths, torch.iinfo(lengths.dtype).max)
    together = int((lengths[:MAX_ROW_PAIRS].cumsum(0) < MIN_ROW_TOKENS).sum()) + 1
    several = [pair(index) for index in range(min(len(lengths), max(3, min(together, MAX_ROW_PAIRS))))]
    blocks = several
    if (lengths >= MIN_ROW_TOKENS).any():
        first = pair(int(enough.argmin()))
        if first.synthetic == first.real:  # then it is not computed; here, two must not see each other
            first = first._replace(synthetic=first.synthetic[:-1] or first.synthetic)
        blocks = [first]
    rows = [blocks, [pair(int(lengths.argmin()))], [_lengthened(pair(int(lengths.argmax())), longest)]]
    if blocks is not several:
        rows.append(several)
    if grouped:  # first, because its gradients are compared
        rows.insert(0, _one_prompt(several, longest))
    return rows


def _one_prompt(pairs: list[Pair], longest: int | None) -> list[Pair]:
    """Return the first pair's prompt and real response with the other responses of all pairs."""
    space = _space(pairs[0], longest)
    return [pairs[0]._replace(synthetic=pair.synthetic[:space], initial=pair.initial[:space]) for pair in pairs]


def _lengthened(pair: Pair, longest: int | None) -> Pair:
    """Append the other responses to the real one.

    No sequence in the data is longer, so a sliding window that the data reaches is noticed.
    """
    return pair._replace(real=[*pair.real, *pair.synthetic, *pair.initial][: _space(pair, longest)])


def _space(pair: Pair, longest: int | None) -> int | None:
    """Return how many tokens of a response fit after the pair's prompt; None without a limit."""
    return None if longest is None else max(1, longest - len(pair.prompt))


class Deviation(NamedTuple):
    """The largest deviation of a response's log-probability from that of the response on its own, in nats."""

    per_root_token: float
    """Divided by the square root of its tokens. Rounding errors grow with the root, systematic errors linearly."""
    per_token: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor, lengths: Tensor) -> "Deviation":
        """Return the largest deviation among [R] log-probs; NaN counts as infinite.

        Args:
            lengths: [R] tokens of the responses.
        """
        far = (found - expected).abs().nan_to_num(torch.inf, torch.inf)
        return max(cls(*one) for one in zip((far / lengths.sqrt()).tolist(), (far / lengths).tolist(), strict=True))


class Tolerance(NamedTuple):
    """The differences that rounding explains."""

    low: float
    """A `Deviation.per_root_token` up to this is always accepted."""
    high: float
    """A `Deviation.per_root_token` above this is always rejected."""
    gradient: float
    """Largest accepted relative difference of the gradients."""


EXACT = Tolerance(1e-3, 1e-3, 1e-3)
ROUGH = Tolerance(0.25, 1.0, 0.3)  # 16 bits: 0.05 nats per token is common, more if routing picks another expert


def squares(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Return the squared distance of two sets of gradients (0 if missing) and the squared norm of `expected`."""
    distance = sum(
        float((found.get(name, torch.zeros_like(own)) - own).square().sum()) for name, own in expected.items()
    )
    norm = sum(float(own.square().sum()) for own in expected.values())
    return (distance if math.isfinite(distance) else math.inf), norm
