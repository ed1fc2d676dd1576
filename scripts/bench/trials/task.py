"""What a task provides."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer
from trials.unit import Found

Scores = dict[str, list[float]]
"""By name, a value in 0…1 for each question."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep: every learning rate with every length. Their checkpoints are the candidates."""

    learning_rates: tuple[float, ...]
    checkpoints: int
    """Number of checkpoints of a run, evenly spaced; at least 2."""
    epochs: tuple[int, ...] = ()
    """Empty: what the limit of compute allows, and a sixth of it; of SDFT, the limit."""


class Task(ABC):
    """Data, start model, configurations and scores of one seed.

    Attributes:
        directory: holds everything that is made; may be deleted.
        inputs: holds the files that the task needs from outside, if any.
        seed: of the data order, of sampling and, on the tiny task, of base model and data.
        known: the candidates that the start was chosen from, where its result is there but no longer its model.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """What `inputs` must hold."""
    without: ClassVar[tuple[str, ...]] = ()
    """Methods that make no sense on the task."""
    compared: ClassVar[tuple[str, ...]]
    """The scores that methods are compared on; the first one decides which target is met."""
    sweep: ClassVar[Sweep]
    dpo_sweep: ClassVar[Sweep]
    sdft_sweep: ClassVar[Sweep]

    def __init__(self, directory: Path, seed: int, inputs: Path | None = None, known: Sequence[Found] = ()) -> None:
        self.directory = directory
        self.seed = seed
        self.inputs = inputs or directory
        self.known = known

    @property
    @abstractmethod
    def start(self) -> Path:
        """The SFT model that all methods start from, made if it is missing."""

    @property
    @abstractmethod
    def data(self) -> Path:
        """The SFT data: chat rows, one turn each."""

    @property
    @abstractmethod
    def sft(self) -> dict[str, Any]:
        """The configuration of more SFT, without `output_dir`."""

    @property
    @abstractmethod
    def spin(self) -> dict[str, Any]:
        """The configuration of SPIN, without `output_dir`."""

    @property
    @abstractmethod
    def sdft(self) -> list[str]:
        """The options of sdft.py that depend on the task."""

    @property
    @abstractmethod
    def judge(self) -> dict[str, Any]:
        """The value of `spin.judge`."""

    @abstractmethod
    def score(self, model: Path, split: str) -> Scores:
        """Return each question's scores on the `dev` or `test` split."""

    def start_sweep(self) -> list[Found]:
        """Return the candidates that the start was chosen from, if it was made by a sweep."""
        return []

    def other(self, model: Path) -> dict[str, float]:
        """Return what else the model has kept or lost, by name."""
        return {}

    @cached_property
    def rows(self) -> list[list[dict[str, str]]]:
        """The messages of the SFT data."""
        return read_chats(self.data)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the SFT data, prompts included: one epoch."""
        tokenizer = AutoTokenizer.from_pretrained(self.start)
        return sum(map(len, tokenizer.apply_chat_template(self.rows, return_dict=False)))


def read_chats(file: Path) -> list[list[dict[str, str]]]:
    """Return the messages of each row of a JSONL file."""
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
