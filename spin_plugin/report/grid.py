"""The grid of prompts and iterations: each real response beside the synthetic ones of every iteration."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
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
    split: str
    example: int
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
        trained = len(self.examples["train"])
        keys = [("train", prompt) if prompt < trained else ("eval", prompt - trained) for prompt in chosen]
        answers: dict[tuple[str, int], dict[int, list[_Response]]] = {key: {} for key in keys}
        for number in self.numbers:
            for response in _responses(self.run.iteration(number), self.notes):
                if (key := (response.split, response.example)) in answers:
                    answers[key].setdefault(number, []).append(response)
        rewards = {number: _rewards_of(self.run.iteration(number), number, keys) for number in self.numbers}
        for split, example in keys:
            stored = self.examples[split][example]
            row = Row(split, example, decode(stored["prompt"]), decode(stored["real"]), len(stored["real"]))
            for number, responses in answers[split, example].items():
                row.iterations[number] = [
                    self._shown(response, stored["real"], rewards[number], decode) for response in responses
                ]
            yield row

    def _shown(self, response: _Response, real: list[int], rewards: "_Rewards", decode: Decode) -> Synthetic:
        reward_real, reward_synthetic = rewards.get((response.split, response.example, tuple(response.tokens)), UNKNOWN)
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
        first = {"train": 0, "eval": len(self.examples["train"])}
        stats = PromptStats.empty(first["eval"], len(self.examples.get("eval", ())))
        for number in self.numbers:
            for response in _responses(self.run.iteration(number), self.notes):
                prompt = first[response.split] + response.example
                stats.asked[prompt] = True
                stats.longest[prompt] = max(stats.longest[prompt], len(response.tokens))
            for split in SPLITS:
                if (pairs := _read_pairs(self.run.iteration(number), number, split)) is not None:
                    stats.add_rewards(first[split] + pairs.examples, *pairs.rewards.T.astype(float))
        return stats


def _responses(directory: IterationDir, notes: list[str]) -> Iterator[_Response]:
    """Yield the responses of the shards that are there; a damaged one is left out and noted."""
    shards = Shards(directory.synthetic)
    for number in sorted(int(path.stem.rpartition("-")[2]) for path in directory.synthetic.glob("shard-*.jsonl")):
        try:
            responses = shards.read(number)
        except SpinError:
            note = f"{shards.shard(number)} is missing or damaged, so its responses are left out"
            notes.extend([note] if note not in notes else [])
            continue
        for one, score in zip(responses, _scores(directory, number, len(responses)), strict=True):
            yield _Response(one["split"], one["example"], one["tokens"], one["finish"], score)


def _scores(directory: IterationDir, shard: int, responses: int) -> list[float | None]:
    """Return the judge's scores of a shard; None for each response if it was not judged."""
    try:
        file = directory.synthetic / f"verdicts-{shard:05d}.json"
        scores: list[float | None] = json.loads(file.read_text(encoding="utf-8"))["scores"]
    except (OSError, ValueError, KeyError, TypeError):
        scores = []
    return scores if len(scores) == responses else [None] * responses


UNKNOWN = (None, None)
_Rewards = dict[tuple[str, int, tuple[int, ...]], tuple[float | None, float | None]]
"""Rewards of the real and the synthetic response by split, prompt and tokens of the synthetic response."""


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
    """Return the pairs with responses of iteration `number`; None without pairs or without stored rewards."""
    file, stored = directory.pairs / f"{split}.arrow", directory.pairs / f"rewards-{split}.safetensors"
    if not file.exists() or not stored.exists():
        return None
    table = open_table(file)
    try:
        rewards = load_file(stored)["rewards"]
    except (SafetensorError, OSError, KeyError):  # being written, or damaged
        return None
    if rewards.shape != (len(table), 2):  # of other pairs
        return None
    rows = np.flatnonzero(table.data.column("iteration").to_numpy() == number)
    examples, indices = (table.data.column(name).to_numpy()[rows] for name in ("example", "index"))
    return _Pairs(examples, rows, rewards[indices], table)


def _rewards_of(directory: IterationDir, number: int, keys: Sequence[tuple[str, int]]) -> _Rewards:
    """Return the rewards of the pairs of these prompts."""
    found: _Rewards = {}
    for split in SPLITS:
        if (pairs := _read_pairs(directory, number, split)) is None:
            continue
        wanted = np.flatnonzero(np.isin(pairs.examples, [example for of, example in keys if of == split]))
        synthetic = pairs.table.select_columns(["synthetic"])[pairs.rows[wanted]]["synthetic"]
        for place, tokens in zip(wanted, synthetic, strict=True):
            real, ours = (float(value) if np.isfinite(value) else None for value in pairs.rewards[place])
            found[split, int(pairs.examples[place]), tuple(tokens)] = (real, ours)
    return found
