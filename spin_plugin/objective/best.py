"""Which iteration of a run is best, and since when has none been better? Read from the entries of run.json.

The models of a run are measured one after another on the same held-out prompts, each in a paired comparison with the
one before. The noise of a difference over several iterations is bounded by the sum of the half-widths of their
intervals, because a standard deviation of a sum is at most the sum of the standard deviations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spin_plugin.objective.decline import CHECKS, NEGLIGIBLE, read_check

START = -1
"""The model that the run started from, among the iterations."""


@dataclass(frozen=True)
class Measured:
    """A metric of a run's models."""

    metric: str
    """Its name in run.json: a check, or `task/metric` of lm-eval."""
    values: dict[int, float]
    """By iteration, ascending, without those that were not measured; START if it was. Of a check: its first mean, then
    each change added to it, because the prompts that count are not the same in every iteration."""
    noise: dict[int, float]
    """Half-width of the 95% interval of an iteration's change, where it is known."""
    lower_is_better: bool = False

    def gain(self, earlier: int, later: int) -> float:
        """Return by how much the later of two iterations is better."""
        difference = self.values[later] - self.values[earlier]
        return -difference if self.lower_is_better else difference

    def noise_between(self, earlier: int, later: int) -> float:
        """Return how large a difference between two iterations can be by chance; 0 if unknown."""
        return sum(width for number, width in self.noise.items() if earlier < number <= later)

    def improved(self, earlier: int, later: int) -> bool:
        """Whether the later of two iterations is better, beyond noise."""
        return self.gain(earlier, later) > self.noise_between(earlier, later)

    def worse_than_start(self, number: int) -> bool:
        """Whether an iteration is worse than the model that the run started from, beyond noise."""
        if START not in self.values:
            return False
        return -self.gain(START, number) > max(self.noise_between(START, number), NEGLIGIBLE)

    def best(self, left_out: Sequence[int] = ()) -> int | None:
        """Return the iteration with the best value, the earlier of equal ones; None if none was measured.

        Args:
            left_out: iterations that do not count, unless no other was measured.
        """
        measured = [number for number in self.values if number != START]
        candidates = [number for number in measured if number not in left_out] or measured
        return max(candidates, key=lambda number: self.gain(candidates[0], number), default=None)

    def last_improvement(self) -> tuple[int, int]:
        """Return the last iteration that improved on all before it, beyond noise, and how many have followed.

        The first measured model is the first to improve on. Raises ValueError if none was measured.
        """
        reference, *later = self.values
        followed = 0
        for number in later:
            if self.improved(reference, number):
                reference, followed = number, 0
            else:
                followed += 1
        return reference, followed


def measured(entries: Sequence[Mapping[str, Any]], metric: str) -> Measured:
    """Read a metric of the finished iterations in run.json.

    Args:
        entries: the finished iterations, in order.
        metric: `held_out`, `judge`, or `task/metric` of lm-eval.
    """
    falling = any(metric in entry.get("lower_is_better", ()) for entry in entries)  # as lm-eval says of its metrics
    found = Measured(metric, {}, {}, falling)
    for number, entry in enumerate(entries):
        if metric not in CHECKS:
            if (value := (entry.get("lm_eval") or {}).get(metric)) is not None:
                found.values[number] = float(value)
        elif check := read_check(entry, metric):
            if number - 1 not in found.values:  # the first, or after a gap, over which nothing can be compared
                found = Measured(metric, {number - 1: check.before}, {})
            found.values[number] = found.values[number - 1] + check.difference
            found.noise[number] = (check.interval[1] - check.interval[0]) / 2
    return found
