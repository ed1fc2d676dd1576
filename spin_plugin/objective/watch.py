"""Findings from the log of training, as it grows.

"Tiny run" is the healthy run of scripts/quickstart.sh (docs/measurements.md). No torch is imported.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spin_plugin.objective.decline import REMEDIES
from spin_plugin.objective.finding import FEWEST_RESPONSES, Entry, Finding, Stats

SATURATED = 0.5
"""Share of saturated pairs in the second half of the first epoch, of the pairs that can be. Accuracy alone is no sign:
in the tiny run 98% of the pairs are ranked correctly in the first epoch, but only 0.1% are saturated."""
WINDOW = 0.5
"""Epochs over which the real reward must be negative."""
FEWEST_ENTRIES = 6
"""Log entries from which their noise can be estimated; a window with fewer is extended."""
STANDARD_ERRORS = 4
"""How far below 0 the mean must be. The rule is applied many times, so 2 would often be exceeded by chance."""
MARGIN_FALL = 0.2
"""Fall of the held-out margin, as a fraction of its best. The pairs are the same each time, so their noise is small."""
CHECKS_PER_EPOCH = 20
"""How often the rules look at the log; each time they read half an epoch of it."""
FEWEST_DIFFERENT = 0.1
"""Share of pairs whose responses differ; if fewer do, their saturation decides nothing."""


def selects(train: Mapping[str, Any]) -> bool:
    """Whether the training pairs lack equal or right responses, which held-out pairs always keep."""
    return bool(train.get("equal_dropped")) or "judge" in train


def accuracy_limit(pairs: Stats) -> float:
    """Return the highest possible accuracy: pairs of equal responses count as misses."""
    train = pairs["train"]
    if selects(train) or not train["pairs"]:
        return 1.0
    return max(0.0, 1 - train["equal"] / train["pairs"])


class LogWatch:
    """Applies the rules to a growing log; each finding is made once."""

    def __init__(self, pairs: Stats, log: Iterable[Entry] = ()) -> None:
        """`pairs` are the statistics of the iteration's pairs; `log` are the entries so far."""
        self.limit = accuracy_limit(pairs)
        self.trained: list[Entry] = []
        """Entries of training: means over their `pairs` pairs."""
        self.evaluated: list[tuple[float, float]] = []
        """Margins of each evaluation: of training since the one before, and held-out."""
        self.findings: dict[str, Finding] = {}
        self._since = 0
        for entry in log:
            self.add(entry)

    def add(self, entry: Entry) -> list[Finding]:
        """Add the next entry; returns what it shows and no earlier one did."""
        found: list[Finding | None] = []
        if math.isfinite(entry.get("spin/reward_real", math.nan)):
            last = self.trained[-1]["epoch"] if self.trained else 0.0
            self.trained.append(entry)
            if math.floor(entry["epoch"] * CHECKS_PER_EPOCH) > math.floor(last * CHECKS_PER_EPOCH):
                found = [_saturated(self.trained, self.limit, entry["epoch"]), _real_falls(self.trained)]
        elif "train_runtime" in entry and self.trained:
            # the last step need not be logged, and only here is the epoch over
            found = [_saturated(self.trained, self.limit, entry["epoch"])]
        elif "eval_spin/reward_margin" in entry and self._since < len(self.trained):
            margin = _mean(self.trained[self._since :], "spin/reward_margin")
            self._since = len(self.trained)
            self.evaluated.append((margin, entry["eval_spin/reward_margin"]))
            found = [_overfits(self.evaluated)]
        new = [finding for finding in found if finding and finding.name not in self.findings]
        self.findings |= {finding.name: finding for finding in new}
        return new


def _mean(entries: Sequence[Entry], name: str) -> float:
    pairs = sum(entry["pairs"] for entry in entries)
    return sum(entry[name] * entry["pairs"] for entry in entries) / pairs


def _saturated(entries: Sequence[Entry], limit: float, epoch: float) -> Finding | None:
    """Whether most pairs are saturated in the second half of the first epoch; `epoch` is now."""
    half = [entry for entry in entries if 0.5 < entry["epoch"] <= 1 and "spin/saturated" in entry]
    if epoch < 1 or sum(entry["pairs"] for entry in half) < FEWEST_RESPONSES or limit < FEWEST_DIFFERENT:
        return None
    share, accuracy = _mean(half, "spin/saturated") / limit, _mean(half, "spin/accuracy")
    if share < SATURATED:
        return None
    return Finding(
        "saturated",
        f"{min(share, 1.0):.0%} of the pairs that differ are saturated before the first epoch is over (accuracy "
        f"{accuracy:.1%}{f' of at most {limit:.1%}' if limit < 1 else ''})",
        "more epochs teach little: set `num_epochs: 1` and more iterations, or lower learning_rate",
    )


def negative_real_reward(entries: Sequence[Entry]) -> float | None:
    """Return the mean of `spin/reward_real` over the last half epoch if it is below 0 beyond noise, else None.

    Args:
        entries: the iteration's log of training, oldest first: `epoch`, `pairs`, and metrics as means over these pairs.
    """
    first, covered = len(entries), 0.0
    while first and (covered < WINDOW or len(entries) - first < FEWEST_ENTRIES):
        first -= 1
        covered = entries[-1]["epoch"] - (entries[first - 1]["epoch"] if first else 0.0)
    window = entries[first:]
    if covered < WINDOW or len(window) < FEWEST_ENTRIES:
        return None
    mean = _mean(window, "spin/reward_real")
    squares = sum((entry["pairs"] * (entry["spin/reward_real"] - mean)) ** 2 for entry in window)
    error = math.sqrt(squares * len(window) / (len(window) - 1)) / sum(entry["pairs"] for entry in window)
    return mean if mean < -STANDARD_ERRORS * error else None


def _real_falls(entries: Sequence[Entry]) -> Finding | None:
    mean = negative_real_reward(entries)
    if mean is None:
        return None
    margin = entries[-1]["spin/reward_margin"]
    return Finding(
        "real_falls",
        f"the mean of spin/reward_real over the last {WINDOW:g} epochs is {mean:.4f}: real responses become less "
        f"likely, while spin/reward_margin is {margin:.4f}",
        REMEDIES,
    )


def _overfits(evaluated: Sequence[tuple[float, float]]) -> Finding | None:
    """Whether the last two evaluations are below the best one before them, while the training margin rises."""
    if len(evaluated) < 3:
        return None
    trained, best = max(evaluated[:-2], key=lambda margins: margins[1])
    worst = max(held_out for _, held_out in evaluated[-2:])
    last = evaluated[-1]
    if best <= 0 or worst > (1 - MARGIN_FALL) * best or last[0] <= trained:
        return None
    return Finding(
        "overfitting",
        f"the held-out margin falls, {best:.4f} → {last[1]:.4f}, while that of training rises, {trained:.4f} → "
        f"{last[0]:.4f}",
        "use fewer num_epochs, or lower learning_rate",
    )
