"""Join SFT examples and synthetic responses into pairs, stored on disk and memory-mapped.

    SFT rows (input_ids, labels) --examples--> prompt, real response        `real/`
    examples + synthetic responses --build_pairs--> prompt, real, synthetic  `iteration-t/pairs/`

Token ids are never decoded and encoded again. Everything streams: one block of rows is in memory at a time, however
many pairs there are.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from spin_plugin.data.table import BLOCK, INITIAL, PAIR_SCHEMA, table_writer

JUDGE_METRIC = "eval_spin/judge"  # JudgeStats.mean of the held-out responses, logged at step 0


class Synthetic(NamedTuple):
    """One synthetic response as vLLM generated it."""

    example: int
    iteration: int
    tokens: list[int]
    truncated: bool
    """It reached `max_tokens` and so has no end token."""
    initial: Sequence[int] = ()
    """Iteration 0's response to the same prompt, if the loss uses it (`initial.with_initial`)."""
    score: float | None = None
    """The judge's, in 0…1; None if it was not judged."""


@dataclass
class JudgeStats:
    """The judge's scores of the synthetic responses."""

    judged: int = 0
    right: int = 0
    """Number of responses that reach `drop_at`."""
    unjudged: int = 0
    """Number of responses that were skipped."""
    mean: float = 0.0
    """Mean score of the judged responses, 0…1."""

    def add(self, score: float | None, drop_at: float) -> bool:
        """Count a score and return whether the response is right."""
        if score is None:
            self.unjudged += 1
            return False
        self.judged += 1
        self.mean += (score - self.mean) / self.judged
        self.right += score >= drop_at
        return score >= drop_at

    def summary(self) -> str:
        """Summarize the scores in a few words."""
        parts = [f"right {self.right / max(1, self.judged):.1%}", f"mean score {self.mean:.4f}"]
        return ", ".join(parts + ([f"unjudged {self.unjudged:,}"] if self.unjudged else []))


@dataclass
class NewestStats:
    """The responses of the iteration's own opponent, whatever becomes of their pairs, without those of earlier ones."""

    responses: int = 0
    truncated: int = 0
    equal: int = 0
    real_mean: float = 0.0
    """Mean length in tokens of the real responses to the same prompts."""
    synthetic_mean: float = 0.0
    distinct_real: int = 0
    distinct_synthetic: int = 0


@dataclass
class PairStats:
    """Counts of synthetic responses by outcome, and lengths of both sides of the pairs in tokens."""

    responses: int = 0
    pairs: int = 0
    empty: int = 0
    equal: int = 0
    over_length: int = 0
    truncated: int = 0
    equal_dropped: bool = True
    real_mean: float = 0.0
    real_p95: float = 0.0
    synthetic_mean: float = 0.0
    synthetic_p95: float = 0.0
    newest: NewestStats = field(default_factory=NewestStats)
    judge: JudgeStats | None = None
    """None without a judge."""

    def share(self, count: int) -> float:
        """`count` as a fraction of the responses, 0..1."""
        return count / self.responses if self.responses else 0.0

    def summary(self) -> str:
        """One line of statistics for the console."""
        kept = "kept, unless right" if self.judge else "kept"
        dropped = "dropped" if self.equal_dropped else kept
        parts = [
            f"{self.pairs:,} pairs from {self.responses:,} synthetic responses",
            f"real {self.real_mean:.1f} tokens (p95 {self.real_p95:.0f})",
            f"synthetic {self.synthetic_mean:.1f} (p95 {self.synthetic_p95:.0f})",
            f"truncated {self.share(self.truncated):.1%}",
            f"equal {self.share(self.equal):.1%} ({dropped})",
            f"empty {self.share(self.empty):.1%}",
        ]
        if self.over_length:
            parts.append(f"over sequence_len {self.share(self.over_length):.1%}")
        if self.judge:
            parts.append(f"judge: {self.judge.summary()}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, without the judge's part if there is no judge."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def build_pairs(
    examples: Dataset,
    synthetic: Iterable[Synthetic],
    path: Path,
    *,
    end_tokens: Sequence[int],
    sequence_len: int,
    keep_equal: bool,
    has_initial: bool = False,
    drop_at: float | None = None,
    keep_right: bool = False,
) -> PairStats:
    """Pair synthetic responses with their prompts and real responses, drop unusable ones, and write the rest.

    Args:
        examples: `real/`, indexed by example id.
        synthetic: responses of this and earlier iterations, newest first; pairs are numbered in this order.
        path: the Arrow file to write.
        end_tokens: a response that is only one of these counts as empty.
        sequence_len: longest prompt plus response; longer pairs are dropped.
        keep_equal: whether to keep pairs whose two responses are identical.
        has_initial: whether to write a column with iteration 0's responses. One that is empty, too long or equal to
            the synthetic response is left out, and its pair stays.
        drop_at: the score from which on a synthetic response is right; None without a judge.
        keep_right: whether to keep pairs whose synthetic response is right.
    """
    schema = PAIR_SCHEMA.append(INITIAL) if has_initial else PAIR_SCHEMA
    stats = PairStats(equal_dropped=not keep_equal, judge=None if drop_at is None else JudgeStats())
    usable, newest = _Usable(set(end_tokens), sequence_len, keep_equal, drop_at, keep_right), _Newest()
    lengths: dict[str, list[int]] = {"real": [], "synthetic": []}
    with table_writer(path, schema) as write:
        for block in _batched(synthetic, BLOCK):
            columns = _join(examples, block, schema.names, stats, usable, newest)
            for side, seen in lengths.items():
                seen.extend(len(tokens) for tokens in columns[side])
            write(columns)
    for side, seen in lengths.items():
        if seen:
            setattr(stats, f"{side}_mean", float(np.mean(seen)))
            setattr(stats, f"{side}_p95", float(np.percentile(seen, 95)))
    stats.newest = newest.result()
    return stats


def _join(
    examples: Dataset,
    block: Sequence[Synthetic],
    names: Sequence[str],
    stats: PairStats,
    usable: "_Usable",
    newest: "_Newest",
) -> dict[str, list[Any]]:
    """Pair one block of responses; returns columns and updates `stats`."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    rows = examples.with_format("arrow")[[response.example for response in block]]
    prompts, reals = rows["prompt"].to_pylist(), rows["real"].to_pylist()
    for response, prompt, real in zip(block, prompts, reals, strict=True):
        newest.count(response, real)
        if not usable.count(response, prompt, real, stats):
            continue
        initial = usable.initial(response, prompt)
        own = 0 if response.tokens == real else len(response.tokens)  # equal responses are computed once
        length = len(prompt) + len(real) + own + len(initial)
        pair = (prompt, real, response.tokens, stats.pairs, response.example, response.iteration, length, initial)
        for name, value in zip(names, pair, strict=False):  # without a column for `initial`, it is empty
            columns[name].append(value)
        stats.pairs += 1
    return columns


@dataclass(frozen=True)
class _Usable:
    """Which pairs are usable; see `build_pairs`."""

    end_tokens: set[int]
    sequence_len: int
    keep_equal: bool
    drop_at: float | None
    keep_right: bool

    def count(self, response: Synthetic, prompt: list[int], real: list[int], stats: PairStats) -> bool:
        """Count a response in `stats` and return whether its pair is usable."""
        stats.responses += 1
        stats.truncated += response.truncated
        empty = self._is_empty(response.tokens)
        equal = response.tokens == real
        over = len(prompt) + max(len(real), len(response.tokens)) > self.sequence_len
        right = stats.judge is not None and self.drop_at is not None and stats.judge.add(response.score, self.drop_at)
        stats.empty += empty
        stats.equal += equal
        stats.over_length += over
        return not (empty or over or (equal and not self.keep_equal) or (right and not self.keep_right))

    def initial(self, response: Synthetic, prompt: list[int]) -> Sequence[int]:
        """Return iteration 0's response if the pair can use it, otherwise an empty one."""
        initial = response.initial
        over = len(prompt) + len(initial) > self.sequence_len
        # the difference of equal responses would be constant
        return [] if self._is_empty(initial) or over or initial == response.tokens else initial

    def _is_empty(self, tokens: Sequence[int]) -> bool:
        return not tokens or (len(tokens) == 1 and tokens[0] in self.end_tokens)


class _Newest:
    """Counts the responses of the newest iteration, which come first. Takes 16 bytes per response."""

    def __init__(self) -> None:
        self.stats, self.iteration = NewestStats(), -1
        self.tokens = {"real": 0, "synthetic": 0}
        self.hashes = {"real": array("q"), "synthetic": array("q")}

    def count(self, response: Synthetic, real: list[int]) -> None:
        """Count a response, if it is of the newest iteration."""
        if not self.stats.responses:
            self.iteration = response.iteration
        if response.iteration != self.iteration:
            return
        self.stats.responses += 1
        self.stats.truncated += response.truncated
        self.stats.equal += response.tokens == real
        for side, tokens in (("real", real), ("synthetic", response.tokens)):
            self.tokens[side] += len(tokens)
            self.hashes[side].append(hash(tuple(tokens)))

    def result(self) -> NewestStats:
        for side, hashes in self.hashes.items():
            setattr(self.stats, f"{side}_mean", self.tokens[side] / max(1, self.stats.responses))
            setattr(self.stats, f"distinct_{side}", len(np.unique(hashes)))
        return self.stats


def _batched(items: Iterable[Synthetic], size: int) -> Iterator[list[Synthetic]]:
    block: list[Synthetic] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def write_stats(path: Path, stats: dict[str, PairStats]) -> None:
    """Write the statistics of the train and eval pairs as JSON."""
    path.write_text(json.dumps({name: value.as_dict() for name, value in stats.items()}, indent=2), encoding="utf-8")


def read_stats(path: Path) -> dict[str, PairStats]:
    """Read what `write_stats` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = {"judge": JudgeStats, "newest": NewestStats}
    return {
        split: PairStats(**value | {name: part(**value[name]) for name, part in parts.items() if name in value})
        for split, value in content.items()
    }
