"""Diagnosis: what goes wrong in an iteration, each with a number and advice.

The rules are pure functions of what is on disk (statistics of the pairs, the log, the entry in run.json), so a resumed
run and `axolotl spin status` find the same. A healthy run has no findings: a rule that has too little data, or that a
good run might fulfil, says nothing. "Tiny run" is the healthy run of scripts/quickstart.sh (docs/measurements.md). No
torch is imported.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from spin_plugin.objective.finding import FEWEST_RESPONSES, Entry, Finding, Stats
from spin_plugin.objective.watch import LogWatch, selects

TRUNCATED = 0.25
"""Share of truncated responses. Tiny run: 0.05% at most; an instruct model without SFT on the data: 76%."""
EQUAL = 0.9
"""Share of responses equal to the real ones. The tiny run still gains with 82%; questions to SQL have 55%."""
DISTINCT = 0.5
"""Distinct synthetic responses as a fraction of the distinct real ones. Tiny run: 1.00."""
FEWEST_DISTINCT = 10
"""Data with fewer distinct real responses, such as classes, says nothing about collapse."""
LENGTH_RATIO = 2.0
"""How many times as long, or as short, as the real responses. Tiny run: 1.00; UltraChat: about 0.8."""
LENGTH_DRIFT = 1.5
"""The same, relative to the iteration before. Tiny run: 1.00."""
MARGIN_GAP = 0.5
"""Held-out margin as a fraction of the training margin, below which the training pairs are learned by heart."""
STANDARD_ERRORS = 2
"""By which the held-out margin must be lower. The tiny run's 40 held-out pairs: 0.180 ± 0.033, 0.175 ± 0.150, 0.175 ±
0.097 after iterations 0 to 2, while the training margin goes from 0.150 to 0.303 and 0.226."""
DIVERGENCE = 0.5
"""Nats per token. Tiny run, after iterations 0 to 3: 0.006, 0.020, 0.029, 0.041. With beta 0.1, a reward_synthetic of
-10 over 200 tokens, from which models can still be good, is 0.5."""


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
    """Whether the held-out margin fell beyond noise although that of training rose, and is far below it.

    Where training leaves out pairs that held-out prompts keep, the two margins are means over different pairs: held-out
    ones fall as more responses equal the real ones, which is how a healthy run ends.
    """
    if any(selects(each.get("pairs", {}).get("train", {})) for each in (entry, before)):
        return None
    held, held_before = entry.get("held_out_pairs", {}), before.get("held_out_pairs", {})
    trained, trained_before = (each.get("metrics", {}).get("spin/reward_margin", math.nan) for each in (entry, before))
    now, earlier = (each.get("reward_margin", math.nan) for each in (held, held_before))
    error, error_before = (each.get("margin_error", math.nan) for each in (held, held_before))
    # A new beta or opponent scales both margins, and mixing in older pairs raises that of training: hence the gap.
    falls = earlier - now > STANDARD_ERRORS * math.hypot(error, error_before)
    far_below = now + STANDARD_ERRORS * error < MARGIN_GAP * trained
    if not (trained > trained_before and falls and far_below):
        return None
    return Finding(
        "overfitting",
        f"since the iteration before, the held-out margin fell, {earlier:.4f} → {now:.4f}, while that of training "
        f"rose, {trained_before:.4f} → {trained:.4f}",
        "evaluate both models and keep the better one; use fewer num_epochs, or lower learning_rate",
    )


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
