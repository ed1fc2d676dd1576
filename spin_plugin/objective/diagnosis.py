"""Diagnosis: what goes wrong in an iteration, each with a number and advice.

The rules are pure functions of what is on disk (statistics of the pairs, the log, the entry in run.json), so a resumed
run and `axolotl spin status` find the same. A healthy run has no findings: a rule that has too little data, or that a
good run might fulfil, says nothing. Importing this module does not import torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spin_plugin.objective.decline import REMEDIES

Stats = Mapping[str, Mapping[str, Any]]
"""Statistics of the pairs by split, as in run.json."""
Entry = Mapping[str, Any]
"""An entry of the log, or of a finished iteration in run.json."""

# "tiny run" is the healthy run of scripts/quickstart.sh, docs/measurements.md.
FEWEST_RESPONSES = 32
"""Shares of fewer responses decide nothing."""
TRUNCATED = 0.25
"""Share of truncated responses. Tiny run: 0.05% at most; an instruct model without SFT on the data: 76%."""
EQUAL = 0.9
"""Share of responses equal to the real ones. The tiny run still gains with 79%; questions to SQL have 55%."""
DISTINCT = 0.5
"""Distinct synthetic responses as a fraction of the distinct real ones. Tiny run: 1.00."""
FEWEST_DISTINCT = 10
"""Data with fewer distinct real responses, such as classes, says nothing about collapse."""
LENGTH_RATIO = 2.0
"""How many times as long, or as short, as the real responses. Tiny run: 1.00; UltraChat: about 0.8."""
LENGTH_DRIFT = 1.5
"""The same, relative to the iteration before. Tiny run: 1.00."""
SATURATED = 0.5
"""Share of saturated pairs in the second half of the first epoch, of the pairs that can be. Accuracy alone is no sign:
in the tiny run 98% of the pairs are ranked correctly in the first epoch, but only 0.1% are saturated."""
WINDOW = 0.5
"""Epochs over which the real reward must be negative."""
FEWEST_ENTRIES = 6
"""Log entries from which their noise can be estimated; a window with fewer is extended."""
STANDARD_ERRORS = 4
"""How far below 0 the mean must be. The rule is applied many times, so 2 would often be exceeded by chance."""
CHECKS_PER_EPOCH = 20
"""How often the rules look at the log; each time they read half an epoch of it."""
MARGIN_FALL = 0.1
"""Fall of the held-out margin, as a fraction of its best; the pairs are the same each time, so noise is small."""
MARGIN_GAP = 0.5
"""Held-out margin as a fraction of the training margin, below which the training pairs are learned by heart."""
DIVERGENCE = 0.5
"""Nats per token, averaged over responses that iteration 0's opponent itself has sampled."""


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


# --- the pairs ---------------------------------------------------------------------------------


def diagnose_pairs(pairs: Stats, before: Stats | None = None) -> list[Finding]:
    """Judge an iteration's responses to the training prompts.

    Args:
        pairs: statistics of the iteration's pairs.
        before: those of the iteration before; None in iteration 0.
    """
    newest = _newest(pairs)
    if not newest:
        return []
    found = [_truncated(newest), _equal(newest), _collapsed(newest)]
    # The mean of truncated responses is that of the limit.
    found += [] if found[0] else [_lengths(newest, _newest(before or {}))]
    return [finding for finding in found if finding]


def _newest(pairs: Stats) -> Mapping[str, Any]:
    """Return the statistics of the responses of the iteration itself; empty if they are missing or too few."""
    newest = pairs.get("train", {}).get("newest") or {}
    return newest if newest.get("responses", 0) >= FEWEST_RESPONSES else {}


def _truncated(newest: Mapping[str, Any]) -> Finding | None:
    share = newest["truncated"] / newest["responses"]
    if share < TRUNCATED:
        return None
    return Finding(
        "truncated",
        f"{share:.0%} of the synthetic responses reach the length limit without an end",
        "raise spin.generation.max_tokens; if they ramble, fine-tune the model on this data first, so that it learns "
        "to stop",
    )


def _equal(newest: Mapping[str, Any]) -> Finding | None:
    share = newest["equal"] / newest["responses"]
    if share < EQUAL:
        return None
    return Finding(
        "converged",
        f"{share:.0%} of the synthetic responses equal the real ones",
        "little is left to learn from these prompts: stop here, or use others in `datasets`",
    )


def _collapsed(newest: Mapping[str, Any]) -> Finding | None:
    real, synthetic = newest["distinct_real"], newest["distinct_synthetic"]
    if real < FEWEST_DISTINCT or synthetic >= DISTINCT * real:
        return None
    return Finding(
        "collapse",
        f"only {synthetic:,} of {newest['responses']:,} synthetic responses are distinct, but {real:,} real ones",
        "set spin.generation.temperature and top_p to 1; if they are, repeat the iteration before with a lower "
        "learning_rate or fewer num_epochs",
    )


def _lengths(newest: Mapping[str, Any], before: Mapping[str, Any]) -> Finding | None:
    real, synthetic = newest["real_mean"], newest["synthetic_mean"]
    lengths = f"synthetic responses have {synthetic:.1f} tokens on average, real ones {real:.1f}"
    if before and _apart(synthetic / real, before["synthetic_mean"] / before["real_mean"]) > LENGTH_DRIFT:
        was = f"{lengths}; in the iteration before {before['synthetic_mean']:.1f} and {before['real_mean']:.1f}"
        return Finding("lengths", was, "set `sft_weight: 5`, or lower learning_rate")
    if _apart(synthetic, real) > LENGTH_RATIO:
        return Finding(
            "lengths",
            lengths,
            "length alone tells them apart: read some of them, check chat_template and eot_tokens, and fine-tune on "
            "this data first",
        )
    return None


def _apart(one: float, other: float) -> float:
    """Return the ratio of the larger to the smaller."""
    low, high = sorted((one, other))
    return high / low if low > 0 else math.inf


def accuracy_limit(pairs: Stats) -> float:
    """Return the highest possible accuracy: pairs of equal responses count as misses."""
    train = pairs["train"]
    if train["equal_dropped"] or "judge" in train or not train["pairs"]:
        return 1.0
    return max(0.0, 1 - train["equal"] / train["pairs"])


# --- the log -----------------------------------------------------------------------------------


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
                found = [_saturated(self.trained, self.limit), _real_falls(self.trained)]
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


def _saturated(entries: Sequence[Entry], limit: float) -> Finding | None:
    """Whether most pairs are saturated in the second half of the first epoch."""
    half = [entry for entry in entries if 0.5 < entry["epoch"] <= 1 and "spin/saturated" in entry]
    if entries[-1]["epoch"] < 1 or sum(entry["pairs"] for entry in half) < FEWEST_RESPONSES or limit < 1 - EQUAL:
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


# --- a finished iteration ----------------------------------------------------------------------


def diagnose_result(entry: Entry, before: Entry | None = None) -> list[Finding]:
    """Judge what is known only at the end of an iteration.

    Args:
        entry: its entry in run.json.
        before: that of the iteration before; None in iteration 0.
    """
    found = [_overfits_more(entry, before or {}), _diverged(entry)]
    return [finding for finding in found if finding]


def _overfits_more(entry: Entry, before: Entry) -> Finding | None:
    """Whether the held-out margin fell although that of training rose, and is far below it."""
    (earlier, held_earlier), (now, held_now) = map(_margins, (before, entry))
    # A new beta or opponent scales both margins, and mixing in older pairs raises that of training: hence the gap.
    if not (now > earlier and held_now < (1 - MARGIN_FALL) * held_earlier and held_now < MARGIN_GAP * now):
        return None
    return Finding(
        "overfitting",
        f"since the iteration before, the held-out margin fell, {held_earlier:.4f} → {held_now:.4f}, while that of "
        f"training rose, {earlier:.4f} → {now:.4f}",
        "evaluate both models and keep the better one; use fewer num_epochs, or lower learning_rate",
    )


def _margins(entry: Entry) -> tuple[float, float]:
    """Return the margins of training, in its last epoch, and of held-out pairs; NaN if unknown."""
    trained = entry.get("metrics", {}).get("spin/reward_margin", math.nan)
    return trained, entry.get("held_out_pairs", {}).get("reward_margin", math.nan)


def _diverged(entry: Entry) -> Finding | None:
    divergence = entry.get("divergence", 0.0)
    if divergence < DIVERGENCE:
        return None
    return Finding(
        "divergence",
        f"the model is {divergence:.2f} nats per token away from iteration 0's opponent, on its own responses",
        "evaluate it before going on; if it is worse, repeat the iteration with a lower learning_rate",
    )


def diagnose(pairs: Stats, log: Iterable[Entry], before: Entry | None = None) -> list[Finding]:
    """Return what is known of an iteration up to the end of its training: of its pairs and its log.

    Args:
        pairs: statistics of its pairs.
        log: its log so far.
        before: the entry of the iteration before in run.json.
    """
    return [*diagnose_pairs(pairs, (before or {}).get("pairs")), *LogWatch(pairs, log).findings.values()]
