"""Tokenised SFT rows and synthetic responses become pairs, on disk and memory-mapped.

    SFT rows (input_ids, labels) --examples--> prompt, real response        `real/`
    examples + synthetic responses --build_pairs--> prompt, real, synthetic  `iteration-t/pairs/`

Token ids are never turned into text and back. Everything streams: what lies in memory is one block
of rows, however many pairs there are.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from spin_plugin.messages import SpinError

IGNORED = -100  # the label of a token that SFT does not train on
BLOCK = 1024  # rows handled at a time

TOKENS = pa.list_(pa.int32())
EXAMPLE_SCHEMA = pa.schema({"prompt": TOKENS, "real": TOKENS})
PAIR_SCHEMA = pa.schema(
    {
        "prompt": TOKENS,
        "real": TOKENS,
        "synthetic": TOKENS,
        "index": pa.int64(),  # position among the pairs: where the opponent's log-probabilities are stored
        "example": pa.int64(),  # id of the prompt: its position in `real/`
        "iteration": pa.int32(),  # whose opponent drew the synthetic response
        "length": pa.int32(),  # tokens of prompt, real and synthetic together
    }
)


class Synthetic(NamedTuple):
    """One synthetic response as it was drawn."""

    example: int
    iteration: int
    tokens: list[int]
    cut: bool
    """Stopped by its budget, so it has no end token."""


def trained_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of every run of tokens that the labels train on."""
    trained = np.concatenate(([False], np.asarray(labels) != IGNORED, [False]))
    edges = np.flatnonzero(trained[1:] != trained[:-1])
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@dataclass
class ExampleCounts:
    """What became of the SFT rows."""

    rows: int = 0
    examples: int = 0
    no_response: int = 0
    no_prompt: int = 0
    too_long: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    """Last token of every real response."""

    def described(self) -> str:
        """One line with what was left out and why."""
        left_out = {
            "without a trained response": self.no_response,
            "without a prompt": self.no_prompt,
            "over sequence_len": self.too_long,
        }
        parts = [f"{count:,} {why}" for why, count in left_out.items() if count]
        return f"{self.examples:,} prompts from {self.rows:,} rows" + (
            f"; left out: {', '.join(parts)}" if parts else ""
        )


def write_examples(
    rows: Dataset, path: Path, *, turns: Literal["first", "last", "all"], sequence_len: int
) -> ExampleCounts:
    """Split SFT rows into prompts and real responses.

    The prompt is everything before a span that the labels train on, earlier turns included; the real
    response is the span. A row with several trained spans gives one example for each of the chosen turns.
    """
    counts = ExampleCounts(rows=len(rows))
    with table_writer(path, EXAMPLE_SCHEMA) as write:
        for block in _blocks(rows, ("input_ids", "labels")):
            examples = [
                example
                for ids, labels in zip(block["input_ids"], block["labels"], strict=True)
                for example in _examples_of_row(ids, labels, turns, sequence_len, counts)
            ]
            write({"prompt": [prompt for prompt, _ in examples], "real": [real for _, real in examples]})
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
    """The tokens that end the real responses of this dataset: where the opponent has to stop too.

    A last token counts when it never stands inside a response, or when it is one of the tokenizer's
    special tokens; so a full stop that happens to be last is no end token.

    Raises:
        SpinError: fewer than 9 in 10 real responses end in such a token.
    """
    total = sum(ends.values())
    candidates = {token for token, count in ends.items() if count >= 0.01 * total}
    inside: set[int] = set()
    for block in _blocks(examples, ("real",)):
        for real in block["real"]:
            inside.update(candidates.intersection(np.asarray(real[:-1]).tolist()))
    common = {token for token in candidates - inside if ends[token] > 1 or total == 1}
    found = sorted(candidates & (set(special) | common), key=lambda token: -ends[token])
    covered = sum(ends[token] for token in found)
    if covered < 0.9 * total:
        raise SpinError(
            f"datasets: only {covered:,} of {total:,} real responses end in an end token, so generation would not know "
            "where to stop; train on the end token (chat_template: `train_on_eos: turn` or `eot_tokens`, "
            "input_output: put it into the last segment)"
        )
    return found


def choose_prompts(available: int, wanted: int | None, *, seed: int, draw: int) -> np.ndarray:
    """Ids of the prompts an iteration plays, ascending.

    Args:
        available: number of examples.
        wanted: `num_prompts`; None or more than there are: all.
        seed: the run's seed.
        draw: 0, or the iteration's number where prompts are drawn anew in each.
    """
    if wanted is None or wanted >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng([seed, draw]).choice(available, wanted, replace=False))


@dataclass
class PairStats:
    """What became of the synthetic responses, and what the pairs look like. Shares are in 0..1 of the responses."""

    responses: int = 0
    pairs: int = 0
    empty: int = 0
    equal: int = 0
    over_length: int = 0
    cut: int = 0
    equal_dropped: bool = True
    real_mean: float = 0.0
    real_p95: float = 0.0
    synthetic_mean: float = 0.0
    synthetic_p95: float = 0.0

    def share(self, count: int) -> float:
        return count / self.responses if self.responses else 0.0

    def described(self) -> str:
        """The iteration's line of statistics."""
        dropped = "dropped" if self.equal_dropped else "kept"
        parts = [
            f"{self.pairs:,} pairs from {self.responses:,} synthetic responses",
            f"real {self.real_mean:.1f} tokens (p95 {self.real_p95:.0f})",
            f"synthetic {self.synthetic_mean:.1f} (p95 {self.synthetic_p95:.0f})",
            f"cut by budget {self.share(self.cut):.1%}",
            f"equal {self.share(self.equal):.1%} ({dropped})",
            f"empty {self.share(self.empty):.1%}",
        ]
        if self.over_length:
            parts.append(f"over sequence_len {self.share(self.over_length):.1%}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_pairs(
    examples: Dataset,
    synthetic: Iterable[Synthetic],
    path: Path,
    *,
    end_tokens: Sequence[int],
    sequence_len: int,
    keep_equal: bool,
) -> PairStats:
    """Join synthetic responses with their prompts and real responses, leave out what cannot teach, store.

    Args:
        examples: `real/`, indexed by example id.
        synthetic: responses of this and of earlier iterations, in the order in which the pairs are numbered.
        path: the Arrow file to write.
        end_tokens: a response that holds nothing else is empty.
        sequence_len: longest prompt plus response.
        keep_equal: keep pairs whose two responses are the same.
    """
    stats = PairStats(equal_dropped=not keep_equal)
    lengths: dict[str, list[int]] = {"real": [], "synthetic": []}
    with table_writer(path, PAIR_SCHEMA) as write:
        for block in _batched(synthetic, BLOCK):
            columns = _join(examples, block, stats, set(end_tokens), sequence_len, keep_equal)
            for side, seen in lengths.items():
                seen.extend(len(tokens) for tokens in columns[side])
            write(columns)
    for side, seen in lengths.items():
        if seen:
            setattr(stats, f"{side}_mean", float(np.mean(seen)))
            setattr(stats, f"{side}_p95", float(np.percentile(seen, 95)))
    return stats


def _join(
    examples: Dataset,
    block: Sequence[Synthetic],
    stats: PairStats,
    end_tokens: set[int],
    sequence_len: int,
    keep_equal: bool,
) -> dict[str, list[Any]]:
    """The pairs of one block of responses, as columns."""
    columns: dict[str, list[Any]] = {name: [] for name in PAIR_SCHEMA.names}
    rows = examples.with_format("arrow")[[response.example for response in block]]
    prompts, reals = rows["prompt"].to_pylist(), rows["real"].to_pylist()
    for response, prompt, real in zip(block, prompts, reals, strict=True):
        stats.responses += 1
        stats.cut += response.cut
        empty = not response.tokens or (len(response.tokens) == 1 and response.tokens[0] in end_tokens)
        equal = response.tokens == real
        over = len(prompt) + max(len(real), len(response.tokens)) > sequence_len
        stats.empty += empty
        stats.equal += equal
        stats.over_length += over
        if empty or over or (equal and not keep_equal):
            continue
        length = len(prompt) + len(real) + len(response.tokens)
        pair = (prompt, real, response.tokens, stats.pairs, response.example, response.iteration, length)
        for name, value in zip(PAIR_SCHEMA.names, pair, strict=True):
            columns[name].append(value)
        stats.pairs += 1
    return columns


class table_writer:
    """An Arrow stream file that `datasets` maps into memory, written block by block."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema

    def __enter__(self) -> Any:
        self.file = pa.OSFile(str(self.path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        return lambda columns: self.stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=self.schema))

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.file.close()


def open_table(path: Path) -> Dataset:
    """The rows of a file that this module wrote, memory-mapped."""
    return Dataset.from_file(str(path))


def _blocks(rows: Dataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Columns of `rows`, a block at a time, as numpy arrays of tokens."""
    selected = rows.select_columns(list(names)).with_format("arrow")
    for start in range(0, len(rows), BLOCK):
        table = selected[start : start + BLOCK]
        yield {name: [row.values.to_numpy() for row in table[name]] for name in names}


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
    """Statistics of the train and eval pairs, beside them."""
    path.write_text(json.dumps({name: value.as_dict() for name, value in stats.items()}, indent=2), encoding="utf-8")


def read_stats(path: Path) -> dict[str, PairStats]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: PairStats(**value) for name, value in content.items()}
