"""The grid of prompts and iterations: each real response beside the synthetic ones of every iteration.

The prompts are chosen by the numbers of the pairs, which are memory-mapped. Then only the shards that can hold their
responses are read, once: a run of a million prompts has gigabytes of them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from pyarrow.compute import list_value_length
from safetensors import SafetensorError
from safetensors.numpy import load_file

from spin_plugin.console import SpinError
from spin_plugin.data.table import open_table
from spin_plugin.generation.shards import Shards
from spin_plugin.report.decoder import Decode
from spin_plugin.report.sample import PromptStats, choose_prompts
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Synthetic:
    """A synthetic response in the grid."""

    text: str
    tokens: int
    finish: str
    """vLLM's reason to stop: `length` means that it was truncated."""
    equal: bool
    """Whether it equals the real response."""
    judge: float | None
    """The judge's score, 0…1; None if it was not judged."""
    reward_real: float | None
    """Reward of the real response in this pair; None if unknown, as for a response that became no pair."""
    reward_synthetic: float | None


@dataclass(frozen=True)
class Row:
    """A prompt of the grid."""

    split: str
    example: int
    """Id of the prompt: its position in `real/`."""
    prompt: str
    real: str
    real_tokens: int
    iterations: dict[int, list[Synthetic]] = field(default_factory=dict)
    """The synthetic responses of each iteration that asked this prompt."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, with the values by which the grid is sorted; None if unknown."""
        every = [response for responses in self.iterations.values() for response in responses]
        real = [one.reward_real for one in every if one.reward_real is not None]
        margins = [
            one.reward_real - one.reward_synthetic
            for one in every
            if one.reward_real is not None and one.reward_synthetic is not None
        ]
        return asdict(self) | {
            "lowest_real": min(real, default=None),
            "lowest_margin": min(margins, default=None),
            "longest": max((one.tokens for one in every), default=0),
        }


class _Response(NamedTuple):
    place: int
    """Position of its prompt among those of both splits, training first. Responses are stored in this order."""
    tokens: list[int]
    finish: str
    score: float | None


class Grid:
    """The examples and responses of a run, from which a few hundred prompts are read as text."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.numbers = run, run.started()
        self.notes: list[str] = []
        """What could not be read."""
        files = {split: run.real / f"{split}.arrow" for split in SPLITS}
        self.examples: dict[str, Dataset] = {split: open_table(file) for split, file in files.items() if file.exists()}

    @property
    def prompts(self) -> int:
        """The number of prompts of both splits."""
        return sum(len(examples) for examples in self.examples.values())

    def rows(self, count: int, decode: Decode) -> Iterator[Row]:
        """Yield up to `count` prompts, chosen by `sample.choose_prompts`."""
        if "train" not in self.examples:
            return
        chosen = choose_prompts(self._stats(), count)
        answers: dict[int, dict[int, list[_Response]]] = {place: {} for place in chosen}
        for number in self.numbers:
            for response in self._responses(self.run.iteration(number), np.sort(chosen)):
                answers[response.place].setdefault(number, []).append(response)
        rewards = {number: self._rewards_of(number, chosen) for number in self.numbers}
        for place in (place for place in chosen if answers[place]):
            split = "eval" if place >= self._first["eval"] else "train"
            example = place - self._first[split]
            stored = self.examples[split][example]
            row = Row(split, example, decode(stored["prompt"]), decode(stored["real"]), len(stored["real"]))
            for number, responses in answers[place].items():
                row.iterations[number] = [
                    self._shown(response, stored["real"], rewards[number], decode) for response in responses
                ]
            yield row

    @property
    def _first(self) -> dict[str, int]:
        """The place of each split's first prompt."""
        return {"train": 0, "eval": len(self.examples["train"])}

    def _shown(self, response: _Response, real: list[int], rewards: "_Rewards", decode: Decode) -> Synthetic:
        reward_real, reward_synthetic = rewards.get((response.place, tuple(response.tokens)), UNKNOWN)
        return Synthetic(
            text=decode(response.tokens),
            tokens=len(response.tokens),
            finish=response.finish,
            equal=response.tokens == real,
            judge=response.score,
            reward_real=reward_real,
            reward_synthetic=reward_synthetic,
        )

    def _stats(self) -> PromptStats:
        stats = PromptStats.empty(self._first["eval"], len(self.examples.get("eval", ())))
        for number in self.numbers:
            for split in SPLITS:
                if (pairs := _read_pairs(self.run.iteration(number), number, split)) is not None:
                    tokens = list_value_length(pairs.table.data.column("synthetic")).to_numpy()[pairs.rows]
                    stats.add_pairs(self._first[split] + pairs.examples, tokens, *pairs.rewards.T.astype(float))
        if not stats.asked.any():  # the first iteration is generating
            stats.asked[:] = True
        return stats

    def _responses(self, directory: IterationDir, wanted: np.ndarray) -> Iterator[_Response]:
        """Yield the responses to the prompts at these ascending places; a damaged shard is left out and noted."""
        shards, chosen = Shards(directory.synthetic), set(wanted.tolist())
        numbers = sorted(int(path.stem.rpartition("-")[2]) for path in directory.synthetic.glob("shard-*.jsonl"))
        # a shard holds what is between its first prompt and that of the next one; of damaged ones that is unknown
        starts = [self._place_of(_first_line(shards.shard(number))) for number in numbers]
        for number, start, end in zip(numbers, starts, [*starts[1:], None], strict=False):
            after = wanted[np.searchsorted(wanted, start or 0) :]
            if not len(after) or (end is not None and after[0] > end):
                continue
            try:
                lines = shards.lines(number)
            except SpinError:
                note = f"{shards.shard(number)} is missing or damaged, so its responses are left out"
                self.notes.extend([note] if note not in self.notes else [])
                continue
            for line, score in zip(lines, _scores(directory, number, len(lines)), strict=True):
                place = self._place_of(line)
                if place is not None and place in chosen:
                    one = json.loads(line)
                    yield _Response(place, one["tokens"], one["finish"], score)

    def _place_of(self, line: str) -> int | None:
        """Return the place of the prompt that a line of a shard answers; None if it is no such line."""
        found = re.match(r'\{"split": "(train|eval)", "example": (\d+),', line)
        return self._first[found[1]] + int(found[2]) if found else None

    def _rewards_of(self, number: int, places: Sequence[int]) -> "_Rewards":
        """Return the rewards of an iteration's pairs of the prompts at these places."""
        found: _Rewards = {}
        for split in SPLITS:
            if (pairs := _read_pairs(self.run.iteration(number), number, split)) is None:
                continue
            own = self._first[split] + pairs.examples
            wanted = np.flatnonzero(np.isin(own, places))
            synthetic = pairs.table.select_columns(["synthetic"])[pairs.rows[wanted]]["synthetic"]
            for pair, tokens in zip(wanted, synthetic, strict=True):
                real, ours = (float(value) if np.isfinite(value) else None for value in pairs.rewards[pair])
                found[int(own[pair]), tuple(tokens)] = (real, ours)
        return found


def _first_line(file: Path) -> str:
    """Return the first line of a file; empty if it cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            return lines.readline()
    except OSError:
        return ""


def _scores(directory: IterationDir, shard: int, responses: int) -> list[float | None]:
    """Return the judge's scores of a shard; None for each response if it was not judged."""
    try:
        file = directory.synthetic / f"verdicts-{shard:05d}.json"
        scores: list[float | None] = json.loads(file.read_text(encoding="utf-8"))["scores"]
    except (OSError, ValueError, KeyError, TypeError):
        scores = []
    return scores if len(scores) == responses else [None] * responses


UNKNOWN = (None, None)
_Rewards = dict[tuple[int, tuple[int, ...]], tuple[float | None, float | None]]
"""Rewards of the real and the synthetic response by place of the prompt and tokens of the synthetic response."""


class _Pairs(NamedTuple):
    """The pairs of an iteration with its own responses, P of them."""

    examples: np.ndarray
    """[P] id of each pair's prompt."""
    rows: np.ndarray
    """[P] its row in the table."""
    rewards: np.ndarray
    """[P, 2] rewards of the real and the synthetic response; NaN if unknown."""
    table: Dataset


def _read_pairs(directory: IterationDir, number: int, split: str) -> _Pairs | None:
    """Return the pairs with responses of iteration `number`; None if there are none yet."""
    file = directory.pairs / f"{split}.arrow"
    if not file.exists():
        return None
    table = open_table(file)
    rows = np.flatnonzero(table.data.column("iteration").to_numpy() == number)
    examples, indices = (table.data.column(name).to_numpy()[rows] for name in ("example", "index"))
    rewards = _read_rewards(directory.rewards(split), len(table))
    return _Pairs(examples, rows, rewards[indices], table)


def _read_rewards(file: Path, pairs: int) -> np.ndarray:
    """Return the [pairs, 2] stored rewards; NaN if they are missing, damaged or those of other pairs."""
    unknown = np.full((pairs, 2), np.nan, np.float32)
    try:
        rewards = load_file(file)["rewards"]
    except (SafetensorError, OSError, KeyError):
        return unknown
    return rewards if rewards.shape == unknown.shape else unknown
