"""Does an iteration make the model worse? Measured on held-out prompts.

Importing this module does not import torch, which keeps `axolotl spin status` fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

REMEDIES = "try `sft_weight: 5`, a lower learning_rate, `loss_type: space` or `real_penalty`"
CONFIDENCE = 0.95
FEWEST_PROMPTS = 8
"""The interval of fewer prompts is too wide to decide anything."""
NEGLIGIBLE = 0.005
"""A smaller fall, in nats per token or of a score, does not count, however certain it is: SPIN's loss often lowers real
responses slightly, and with thousands of prompts that would be significant."""


class Check(NamedTuple):
    """A check of a finished iteration, under its name in run.json."""

    measured: str
    """What is measured on held-out prompts."""
    worse: str
    """What an iteration that made it worse did."""
    unit: str


CHECKS = {
    "held_out": Check("held-out real responses", "made held-out real responses less likely", "nats per token"),
    "judge": Check(
        "judge's score of held-out responses", "lowered the judge's score of held-out responses", "mean score"
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A measurement of the opponent and of the trained model on the same held-out prompts."""

    prompts: int
    before: float
    """Mean over the prompts with the opponent."""
    after: float
    """The same with the trained model."""
    difference: float
    """Mean of the prompts' differences, `after - before`."""
    interval: tuple[float, float]
    """95% confidence interval of `difference`."""

    @property
    def worse(self) -> bool:
        """Whether it fell, beyond the noise of the prompts and by more than a negligible amount."""
        return self.interval[1] < 0 and self.difference < -NEGLIGIBLE

    def summary(self, unit: str) -> str:
        """Return `before → after` in this unit, with difference, interval and number of prompts, on one line."""
        low, high = self.interval
        return (
            f"{_signed(self.before)} → {_signed(self.after)} {unit} ({_signed(self.difference)}, "
            f"{CONFIDENCE:.0%} interval {_signed(low)}…{_signed(high)}, {self.prompts:,} prompts)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return asdict(self) | {"worse": self.worse}


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def read_check(entry: Mapping[str, Any], name: str) -> Comparison | None:
    """Read a check of a finished iteration in run.json; None if it was not checked."""
    stored = entry.get(name)
    if stored is None:
        return None
    low, high = stored["interval"]
    return Comparison(stored["prompts"], stored["before"], stored["after"], stored["difference"], (low, high))


def decline(entry: Mapping[str, Any]) -> str | None:
    """Say what a finished iteration in run.json made worse; None if nothing is known to be."""
    found = {name: read_check(entry, name) for name in CHECKS}
    worse = [
        f"{CHECKS[name].worse}, {check.summary(CHECKS[name].unit)}"
        for name, check in found.items()
        if check and check.worse
    ]
    return " and ".join(worse) or None


def row_means(values: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of each row's values: turns of one conversation and responses to one prompt are not independent.

    Args:
        values: [N]
        rows: [N] number of the row of each, R distinct ones.

    Returns:
        [R], by ascending number.
    """
    _, place, counts = rows.unique(return_inverse=True, return_counts=True)
    return values.new_zeros(len(counts)).index_add(0, place, values) / counts


def compare(before: Tensor, after: Tensor, rows: Tensor | None = None) -> Comparison:
    """Compare two models on the same prompts: the mean paired difference and its interval by Student's t.

    Args:
        before: [N] a measurement of each prompt with the opponent, N ≥ 2.
        after: [N] the same with the trained model.
        rows: [N] number of the SFT row, at least two, each of which counts with its mean (`row_means`); by default each
            prompt is a row of its own.
    """
    from scipy.special import stdtrit

    prompts = len(before)
    before, after = before.double(), after.double()
    if rows is not None:
        before, after = row_means(before, rows), row_means(after, rows)
    differences = after - before
    number, mean = len(differences), float(differences.mean())
    quantile = float(stdtrit(number - 1, (1 + CONFIDENCE) / 2))
    margin = quantile * float(differences.std()) / math.sqrt(number)
    return Comparison(prompts, float(before.mean()), float(after.mean()), mean, (mean - margin, mean + margin))


def divergence(first: Tensor, trained: Tensor, tokens: Tensor) -> float:
    """Estimate KL(p_0 || p_theta) in nats per token from responses that p_0 has sampled.

    KL = E[log p_0(y) - log p_theta(y)] over y ~ p_0, here the mean over N responses divided by their mean length. It is
    without bias up to the noise of N responses, so a small one can be negative; longer responses count more. With
    another `temperature` than 1, or `top_p` below 1, the responses are not p_0's own: its likeliest ones weigh more, so
    the estimate is biased, in either direction.

    Args:
        first: [N] log-probs of the responses under p_0.
        trained: [N] under the trained model.
        tokens: [N] their lengths.
    """
    return float((first.double() - trained.double()).sum() / tokens.sum())
