"""The training log as curves: a timeline of all iterations, pooled to as many points as a chart can show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spin_plugin.objective.metrics import METRICS
from spin_plugin.run.directory import RunDir

POINTS = 200
"""Points per iteration that show its noise."""
TREND = 24
"""Points per iteration that show its trend."""

Entry = Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """The log of one iteration."""

    iteration: int
    start: float
    """Optimizer steps of the iterations before it."""
    end: float
    """Optimizer steps up to its last log entry."""
    points: list[dict[str, float]]
    """Pooled entries: `step`, counted from the first iteration on, and the means of the metrics."""
    trend: list[dict[str, float]]
    """The same, pooled further."""


def read_curves(run: RunDir) -> list[Curve]:
    """Return the logs of all iterations that have one, on one axis of steps."""
    curves, start = [], 0.0
    for number in run.started():
        entries = [entry for entry in run.iteration(number).read_log() if "pairs" in entry and "step" in entry]
        if entries:
            end = start + max(entry["step"] for entry in entries)
            points, trend = (
                [point | {"step": start + point["step"]} for point in pool(entries, most)] for most in (POINTS, TREND)
            )
            curves.append(Curve(number, start, end, points, trend))
            start = end
    return curves


def pool(entries: Sequence[Entry], most: int) -> list[dict[str, float]]:
    """Pool consecutive log entries into at most `most`: their last step, and each metric's mean over all pairs.

    Values that are not finite, and metrics of which an entry knows nothing, are left out.
    """
    size = math.ceil(len(entries) / most)
    return [_pooled(entries[first : first + size]) for first in range(0, len(entries), size)] if entries else []


def _pooled(entries: Sequence[Entry]) -> dict[str, float]:
    pooled: dict[str, float] = {"step": entries[-1]["step"]}
    for name in (f"spin/{metric}" for metric in METRICS):
        known = [entry for entry in entries if entry["pairs"] and math.isfinite(entry.get(name, math.nan))]
        if known:
            pooled[name] = sum(entry[name] * entry["pairs"] for entry in known) / sum(entry["pairs"] for entry in known)
    return pooled
