"""A finding: something that goes wrong in an iteration, with numbers and advice."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Stats = Mapping[str, Mapping[str, Any]]
"""Statistics of the pairs by split, as in run.json."""
Entry = Mapping[str, Any]
"""An entry of the log, or of a finished iteration in run.json."""

FEWEST_RESPONSES = 32
"""Shares of fewer responses or pairs decide nothing."""


class Finding(NamedTuple):
    """Something that the user should know and can change."""

    name: str
    message: str
    """What was found, with its numbers."""
    advice: str
    """What to do, with the key to change."""

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}"


def as_dicts(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Return the form in run.json."""
    return [finding._asdict() for finding in findings]
