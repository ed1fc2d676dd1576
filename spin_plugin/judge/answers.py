"""Ready-made judges of short answers: `exact` and `number`."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

# A sign after a letter, digit or bracket is an operator or a hyphen: `7-3` ends in 3.
NUMBER = re.compile(
    r"(?:(?<![\w.,)\]])[-+])?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![\w.])(?=\.[0-9]))"  # 1,234 or 1234 or nothing before .5
    r"(?:\.[0-9]+)?"
    r"(?:[eE][-+]?[0-9]{1,3}(?!\w))?"  # of three digits at most: a Decimal of a million would fill the memory
)

MINUS = str.maketrans("−–", "--")


def exact(
    prompt: Sequence[Mapping[str, Any]],
    real: Sequence[str],
    synthetic: Sequence[str],
    *,
    ignore_case: bool = False,
    ignore_whitespace: bool = False,
) -> list[float]:
    """Score 1 if the text equals the real response, otherwise 0.

    Args:
        prompt: not used.
        real: the real responses.
        synthetic: the synthetic responses.
        ignore_case: ignore upper and lower case.
        ignore_whitespace: ignore whitespace at both ends, and how much of it is in between.
    """

    def normal(text: str) -> str:
        text = " ".join(text.split()) if ignore_whitespace else text
        return text.casefold() if ignore_case else text

    return [float(normal(one) == normal(other)) for one, other in zip(real, synthetic, strict=True)]


def number(
    prompt: Sequence[Mapping[str, Any]], real: Sequence[str], synthetic: Sequence[str], *, tolerance: float = 0.0
) -> list[float]:
    """Score 1 if the last number of a response is that of the real one, otherwise 0; for math word problems.

    Args:
        prompt: not used.
        real: the real responses; one without a number is never matched.
        synthetic: the synthetic responses.
        tolerance: the largest difference that counts as equal.
    """

    largest = Decimal(str(tolerance))

    def close(one: Decimal | None, other: Decimal | None) -> bool:
        return one is not None and other is not None and (one == other or abs(one - other) <= largest)

    return [float(close(last_number(one), last_number(other))) for one, other in zip(real, synthetic, strict=True)]


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, like -1,234.5 or 2e-3; None without one. A dash can be a minus sign."""
    found = NUMBER.findall(text.translate(MINUS))
    return Decimal(found[-1].replace(",", "")) if found else None
