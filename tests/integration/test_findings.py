"""Each finding is provoked by a setting that users do choose, through real vLLM, plugin and trainer.

A model without SFT on the data and a learning rate that is too high are in test_worse.py; a healthy run is that of
test_quickstart.py.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, chat_rows, spin_config, write_config, write_jsonl
from transformers import AutoModelForCausalLM

from spin_plugin.data.table import open_table
from spin_plugin.run.directory import RunDir

pytestmark = pytest.mark.slow
ROWS = 96  # of which 32 are held out


def rows_answering(answers: Iterable[str]) -> list[dict[str, Any]]:
    """Return the conversations of `chat_rows` with other answers."""
    return [
        {"messages": [row["messages"][0], {"role": "assistant", "content": answer}]}
        for row, answer in zip(chat_rows(ROWS), answers, strict=True)
    ]


def letters(seed: int, count: int, length: int) -> list[str]:
    """Return answers of random letters, of which one says nothing about another."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcd", k=length)) for _ in range(count)]


def fine_tuned(start: Path, examples: Sequence[tuple[list[int], list[int]]], path: Path) -> Path:
    """Fine-tune a model on prompts and responses, 400 steps of 16, and save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(start).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        rows = [examples[(step * 16 + place) % len(examples)] for place in range(16)]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        tokens, labels = torch.full((16, width), 256), torch.full((16, width), -100)
        for place, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            tokens[place, :end] = torch.tensor(prompt + response)
            labels[place, len(prompt) : end] = torch.tensor(response)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run_with(directory: Path, model: Path, rows: list[dict[str, Any]], run_jobs: Callable[..., None],
             generation: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:  # fmt: skip
    """Run one iteration and return its findings."""
    directory.mkdir()
    data = write_jsonl(directory / "chat.jsonl", rows)
    config = spin_config(directory, model, data, **changes)
    config["spin"] |= {"iterations": 1, "beta": 1.0}
    config["spin"]["generation"] = config["spin"]["generation"] | {"max_tokens": None} | (generation or {})
    run_jobs((write_config(directory, config), 1))
    state = RunDir(directory / "run").read_state()
    assert state is not None
    (entry,) = state.finished
    said = [line for line in (directory / "rank-0.log").read_text().splitlines() if line.startswith("spin: warning: ")]
    for finding in entry["findings"]:
        assert said.count(f"spin: warning: {finding['message']}; {finding['advice']}") == 1, said
    return entry["findings"]


def names(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["name"] for finding in findings]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("findings")


@pytest.fixture(scope="module")
def cold(directory: Path, llama: Path, run_jobs: Callable[..., None]) -> list[dict[str, Any]]:
    """The findings of a run that samples near the maximum and learns fast."""
    generation = {"temperature": 0.01, "max_tokens": 3}
    rows, path = chat_rows(ROWS), directory / "cold"
    return run_with(path, llama, rows, run_jobs, generation, learning_rate=5e-3, num_epochs=2)


@pytest.fixture(scope="module")
def examples(directory: Path, cold: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of `chat_rows`, as Axolotl has tokenized them."""
    return [(row["prompt"], row["real"]) for row in open_table(directory / "cold/run/real/train.arrow")]


@pytest.fixture(scope="module")
def memorized(directory: Path, examples: list[tuple[list[int], list[int]]], llama: Path) -> Path:
    """A model that knows the answers of `chat_rows` by heart."""
    return fine_tuned(llama, examples, directory / "memorized")


def test_low_temperature_and_a_high_learning_rate(cold: list[dict[str, Any]]) -> None:
    assert names(cold)[:3] == ["truncated", "collapse", "saturated"]


def test_converged_start(directory: Path, memorized: Path, run_jobs: Callable[..., None]) -> None:
    found = run_with(directory / "converged", memorized, chat_rows(ROWS), run_jobs, learning_rate=1e-6)
    assert names(found) == ["converged"]


def test_model_of_other_data(directory: Path, memorized: Path, run_jobs: Callable[..., None]) -> None:
    """Its answers are a third as long."""
    rows = rows_answering(letters(0, ROWS, 60))
    found = run_with(directory / "other", memorized, rows, run_jobs, learning_rate=1e-6)
    assert names(found) == ["lengths"]


def test_few_rows_and_many_epochs(
    directory: Path, examples: list[tuple[list[int], list[int]]], llama: Path, run_jobs: Callable[..., None]
) -> None:
    """The model has learned what all answers share; what is left is to learn those of training by heart."""
    encode, end = byte_tokenizer().encode, examples[0][1][-1:]
    answers = letters(1, 100 * len(examples), 8)
    other = [(examples[n % len(examples)][0], encode(answer) + end) for n, answer in enumerate(answers)]
    model = fine_tuned(llama, other, directory / "letters")
    changes = {"num_epochs": 24, "micro_batch_size": 16, "val_set_size": 32, "eval_strategy": "epoch"}
    found = run_with(directory / "few", model, rows_answering(letters(0, ROWS, 8)), run_jobs, **changes)
    assert "overfitting" in names(found)
