"""Convert tokenized SFT rows to examples, each a prompt and its real response."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from spin_plugin.console import SpinError
from spin_plugin.data.table import EXAMPLE_SCHEMA, blocks, table_writer

FEWEST_HELD_OUT = 32
"""Fewer prompts would show only a large change."""
IGNORED = -100  # label of tokens that SFT does not train on


def trained_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, end) of every run of tokens that the labels train on."""
    trained = np.concatenate(([False], np.asarray(labels) != IGNORED, [False]))
    edges = np.flatnonzero(trained[1:] != trained[:-1])
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@dataclass
class ExampleCounts:
    """Statistics of the conversion of SFT rows to examples."""

    rows: int = 0
    examples: int = 0
    no_response: int = 0
    no_prompt: int = 0
    too_long: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    """How often each token ends a real response."""

    def summary(self) -> str:
        """Summarize in one line what was converted, and what was skipped and why."""
        skipped = {
            "without a trained response": self.no_response,
            "without a prompt": self.no_prompt,
            "over sequence_len": self.too_long,
        }
        parts = [f"{count:,} {why}" for why, count in skipped.items() if count]
        return f"{self.examples:,} prompts from {self.rows:,} rows" + (f"; skipped {', '.join(parts)}" if parts else "")


def write_examples(
    rows: Dataset, path: Path, *, turns: Literal["first", "last", "all"], sequence_len: int
) -> ExampleCounts:
    """Split SFT rows into prompts and real responses.

    A real response is a span that the labels train on; its prompt is everything before it, including earlier turns.
    A row with several trained spans yields one example for each of the chosen turns.
    """
    counts, first = ExampleCounts(rows=len(rows)), 0
    with table_writer(path, EXAMPLE_SCHEMA) as write:
        for block in blocks(rows, ("input_ids", "labels")):
            examples = [
                (*example, row)
                for row, (ids, labels) in enumerate(zip(block["input_ids"], block["labels"], strict=True), first)
                for example in _examples_of_row(ids, labels, turns, sequence_len, counts)
            ]
            columns = zip(*examples, strict=True) if examples else ((), (), ())
            write(dict(zip(EXAMPLE_SCHEMA.names, columns, strict=True)))
            first += len(block["labels"])
    return counts


def _examples_of_row(
    ids: Sequence[int], labels: Sequence[int], turns: str, sequence_len: int, counts: ExampleCounts
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    spans = trained_spans(labels)
    counts.no_response += not spans
    chosen = {"first": spans[:1], "last": spans[-1:], "all": spans}[turns]
    for start, end in chosen:
        if start == 0:
            counts.no_prompt += 1
        elif end > sequence_len:
            counts.too_long += 1
        else:
            counts.examples += 1
            counts.ends[int(ids[end - 1])] += 1
            yield ids[:start], ids[start:end]


def find_end_tokens(examples: Dataset, ends: Counter[int], special: Iterable[int]) -> list[int]:
    """Return the tokens that end this dataset's real responses, most frequent first; generation stops at them.

    A last token counts if it never occurs inside a response or is a special token of the tokenizer. A period that
    happens to come last does not. Tokens that end fewer than 1% of the responses are ignored.

    Raises:
        SpinError: fewer than 90% of the real responses end in such a token.
    """
    total = sum(ends.values())
    candidates = {token for token, count in ends.items() if count >= 0.01 * total}
    inside: set[int] = set()
    for block in blocks(examples, ("real",)):
        for real in block["real"]:
            inside.update(candidates.intersection(np.asarray(real[:-1]).tolist()))
    common = {token for token in candidates - inside if ends[token] > 1 or total == 1}
    found = sorted(candidates & (set(special) | common), key=lambda token: -ends[token])
    covered = sum(ends[token] for token in found)
    if covered < 0.9 * total:
        raise SpinError(
            f"datasets: only {covered:,} of {total:,} real responses end in an end token, so generation would not "
            "stop; train on the end token (chat_template: set `train_on_eos: turn` or `eot_tokens`; "
            "input_output: add it to the last segment)"
        )
    return found


def choose_held_out(rows: int, fraction: float, *, num_prompts: int | None, seed: int) -> np.ndarray:
    """Return the SFT rows to hold out, in ascending order; none if there are too few rows.

    Whole rows, because the turns of one conversation resemble each other.

    Args:
        rows: number of SFT rows.
        fraction: `held_out`, a fraction of the rows, or of `num_prompts` if that is smaller.
        num_prompts: number of prompts in an iteration; None if not limited.
        seed: the run's seed.
    """
    if not fraction or rows < 2 * FEWEST_HELD_OUT:
        return np.arange(0)
    count = int(fraction * min(rows, num_prompts or rows))
    return choose_prompts(rows, max(FEWEST_HELD_OUT, count), seed=seed, sample=0)


def choose_prompts(available: int, count: int | None, *, seed: int, sample: int) -> np.ndarray:
    """Return the ids of an iteration's prompts in ascending order.

    Args:
        available: number of examples.
        count: `num_prompts`; None or more than `available` selects all.
        seed: the run's seed.
        sample: the iteration's number if each iteration samples its own prompts, otherwise 0.
    """
    if count is None or count >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng([seed, sample]).choice(available, count, replace=False))
