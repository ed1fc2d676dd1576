"""The held-out split of a run without held-out data of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from datasets import Dataset
from tiny import VOCABULARY, byte_tokenizer

from spin_plugin.args import SpinArgs
from spin_plugin.config.specs import DataSpec
from spin_plugin.data.examples import IGNORED, choose_held_out
from spin_plugin.data.real import Real, prepare_real
from spin_plugin.run.directory import RunDir

END = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
TURNS = 3


class Rows:
    """A dataset of conversations of three turns. All tokens of a row but its end tokens are the row's number."""

    def __init__(self, train: int, held_out: int = 0) -> None:
        self.splits = {"train": range(train), "eval": range(train, train + held_out)}

    def rows(self, directory: str) -> dict[str, Dataset]:
        return {split: self._tokenized(numbers) for split, numbers in self.splits.items() if numbers}

    def _tokenized(self, numbers: range) -> Dataset:
        labels = [[IGNORED, number % 256, END] * TURNS for number in numbers]
        ids = [[number % 256, number % 256, END] * TURNS for number in numbers]
        return Dataset.from_dict({"input_ids": ids, "labels": labels})

    def tokenizer(self) -> Any:
        return byte_tokenizer()

    def vocabulary(self) -> int:
        return VOCABULARY


class NoRows(Rows):
    """A dataset that must not be read."""

    def rows(self, directory: str) -> dict[str, Dataset]:
        raise AssertionError


def prepared(run: Path, source: Rows, *, seed: int = 7, **spin: Any) -> Real:
    return prepare_real(source, RunDir(run), SpinArgs(**spin), DataSpec(sequence_len=100, seed=seed))


def numbers(examples: Dataset) -> list[int]:
    return [prompt[0] for prompt in examples["prompt"]]


@pytest.mark.parametrize(
    ("rows", "fraction", "num_prompts", "expected"),
    [
        (10_000, 0.02, None, 200),
        (10_000, 0.02, 2_000, 40),
        (10_000, 0.02, 20_000, 200),
        (10_000, 0.02, 10, 32),
        (1_000, 0.02, None, 32),
        (64, 0.02, None, 32),
        (63, 0.02, None, 0),
        (64, 0.999, None, 63),
        (10_000, 0.0, None, 0),
    ],
)
def test_number_of_held_out_rows(rows: int, fraction: float, num_prompts: int | None, expected: int) -> None:
    held_out = choose_held_out(rows, fraction, num_prompts=num_prompts, seed=0).tolist()
    assert len(held_out) == len(set(held_out)) == expected
    assert set(held_out) <= set(range(rows))


def test_rows_are_held_out_with_all_their_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = prepared(tmp_path, Rows(100))
    assert real.eval is not None
    train, held_out = numbers(real.train), numbers(real.eval)
    assert len(set(held_out)) == 32
    assert len(held_out) == 32 * TURNS
    assert len(train) == 68 * TURNS
    assert set(train) | set(held_out) == set(range(100))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert line == (
        "spin: note: held-out split: 96 prompts from 32 rows, to check every iteration "
        "(spin.held_out: 0.02; 0 disables this)"
    )


def test_seed_decides_which_rows_are_held_out(tmp_path: Path) -> None:
    found = []
    for name, seed in {"a": 7, "b": 7, "c": 8}.items():
        real = prepared(tmp_path / name, Rows(100), seed=seed)
        assert real.eval is not None
        found.append(numbers(real.eval))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_small_dataset_is_trained_on_entirely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = prepared(tmp_path, Rows(63))
    assert real.eval is None
    assert len(real.train) == 63 * TURNS
    assert "fewer than 64 rows: none is held out, so it is not checked whether" in capsys.readouterr().out


def test_zero_disables_it_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(tmp_path, Rows(100), held_out=0).eval is None
    assert "held" not in capsys.readouterr().out


def test_held_out_data_of_the_configuration_is_used_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = prepared(tmp_path, Rows(100, held_out=5))
    assert real.eval is not None
    assert sorted(set(numbers(real.eval))) == list(range(100, 105))
    assert len(real.train) == 100 * TURNS
    assert "spin: note: held-out split: 15 prompts from 5 rows\n" in capsys.readouterr().out


def test_run_keeps_the_split_that_it_started_with(tmp_path: Path) -> None:
    """Also a run of an earlier version, which held out nothing, and the frozen one, with held-out data of its own."""
    prepared(tmp_path / "without", Rows(100), held_out=0)
    assert prepared(tmp_path / "without", NoRows(100)).eval is None
    prepared(tmp_path / "with", Rows(100))
    assert prepared(tmp_path / "with", NoRows(100), held_out=0.5, seed=1).eval is not None
    frozen = prepared(ROOT / "tests/data/run-0.2/run", NoRows(12))
    assert frozen.eval is not None
    assert len(frozen.eval) == json.loads((ROOT / "tests/data/run-0.2/run/iteration-0/pairs/stats.json").read_text())[
        "eval"
    ]["responses"]  # fmt: skip
