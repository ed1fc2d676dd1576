"""Run directories as training leaves them, of any size, without training: for the report's tests and its benchmark."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from safetensors.numpy import save_file
from tiny import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from spin_plugin import __version__
from spin_plugin.data.pairs import Synthetic, build_pairs, write_stats
from spin_plugin.data.table import EXAMPLE_SCHEMA, open_table, table_writer
from spin_plugin.generation.job import SHARD
from spin_plugin.generation.shards import Shards
from spin_plugin.objective.metrics import METRICS
from spin_plugin.run.directory import IterationDir, RunDir
from spin_plugin.run.state import RunState

Example = tuple[str, str]
"""A prompt and its real response."""
Answer = Callable[[int, int], Sequence[str]]
"""Iteration, position of a prompt among those of its split → synthetic responses. Each real and synthetic response ends
with `</s>`; a synthetic one without it was truncated."""


def make_run(
    directory: Path, train: Sequence[Example], held_out: Sequence[Example], answer: Answer, iterations: int, **more: Any
) -> Path:
    """Write a run with `iterations` finished iterations; returns its configuration. `more` is added to each entry."""
    directory.mkdir(parents=True)
    run, tokenizer = RunDir(directory / "run"), byte_tokenizer()
    run.real.mkdir(parents=True)
    encoded = {"train": _encode(train, tokenizer), "eval": _encode(held_out, tokenizer)}
    examples = {split: _write_examples(run.real / f"{split}.arrow", rows) for split, rows in encoded.items()}
    (run.real / "meta.json").write_text(json.dumps({"stop_tokens": [258], "eval": bool(held_out)}))
    config = {
        "base_model": "model",
        "output_dir": str(run.root),
        "plugins": ["spin_plugin.SpinPlugin"],
        "rl": "spin",
        "spin": {"iterations": iterations},
    }
    entries = []
    for number in range(iterations):
        here = run.iteration(number)
        _write_iteration(here, number, examples, answer, tokenizer)
        here.config.write_text(yaml.safe_dump(config | {"learning_rate": 5e-7 / (number + 1)}))
        stats = json.loads((here.pairs / "stats.json").read_text())
        entry = {"iteration": number, "finished_at": "", "pairs": stats, "metrics": here.last_metrics()}
        entries.append(entry | more)
    run.write_state(RunState(config, entries, __version__))
    (directory / "config.yml").write_text(yaml.safe_dump(config))
    return directory / "config.yml"


def write_rewards(here: IterationDir, split: str, rewards: np.ndarray) -> None:
    """Write the per-pair rewards [N, 2] of a split."""
    save_file({"rewards": rewards.astype(np.float32)}, here.pairs / f"rewards-{split}.safetensors")


def _encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    return [(encode(prompt, tokenizer), encode(real, tokenizer)) for prompt, real in examples]


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return a text's tokens; lone surrogates become bytes that are no UTF-8."""
    if text.isascii() or text.encode("utf-8", "replace").decode() == text:
        return tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.convert_tokens_to_ids("ÿ")] + tokenizer.encode(text.encode("ascii", "ignore").decode())


def _write_examples(path: Path, rows: list[tuple[list[int], list[int]]]) -> Dataset:
    with table_writer(path, EXAMPLE_SCHEMA) as write:
        for start in range(0, len(rows), 1024):
            block = rows[start : start + 1024]
            numbers = list(range(start, start + len(block)))
            write({"prompt": [p for p, _ in block], "real": [r for _, r in block], "row": numbers})
    return open_table(path)


def _write_iteration(
    here: IterationDir, number: int, examples: dict[str, Dataset], answer: Answer, tokenizer: PreTrainedTokenizerFast
) -> None:
    for directory in (here.path, here.synthetic, here.pairs):
        directory.mkdir()
    tokenizer.save_pretrained(here.path)
    shards, stats = Shards(here.synthetic), {}
    responses = list(_responses(number, examples, answer, tokenizer))
    here.synthetic.joinpath("job.json").write_text(json.dumps({"requests": len(responses)}))
    for shard in range(0, len(responses), SHARD):
        shards.write(shard // SHARD, responses[shard : shard + SHARD])
    random = np.random.default_rng(number)
    for split, rows in examples.items():
        synthetic = (
            Synthetic(one["example"], number, one["tokens"], one["finish"] == "length")
            for one in responses
            if one["split"] == split
        )
        stats[split] = build_pairs(
            rows, synthetic, here.pairs / f"{split}.arrow", end_tokens=[258], sequence_len=1 << 20, keep_equal=True
        )
        write_rewards(here, split, random.normal([0.3 - 0.2 * number, -0.8], 0.6, (stats[split].pairs, 2)))
    write_stats(here.pairs / "stats.json", stats)
    here.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in _log(random)))


def _responses(
    number: int, examples: dict[str, Dataset], answer: Answer, tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, Any]]:
    for split, rows in examples.items():
        for example in range(len(rows)):
            for text in answer(number, example):
                finish = "stop" if text.endswith("</s>") else "length"
                yield {
                    "split": split, "example": example, "tokens": encode(text, tokenizer), "finish": finish, "stop": None
                }  # fmt: skip


def _log(random: np.random.Generator, steps: int = 100) -> Iterator[dict[str, float]]:
    for step in range(1, steps + 1):
        margin = 2 * step / steps + random.normal(0, 0.2)
        values = dict.fromkeys(METRICS, -0.5) | {
            "loss": float(np.log1p(np.exp(-margin))), "accuracy": float(np.clip(0.5 + margin / 4, 0, 1)),
            "reward_margin": margin, "reward_real": margin / 4, "reward_synthetic": -margin * 0.75, "saturated": 0.1,
        }  # fmt: skip
        yield {"step": step, "epoch": step / steps, "pairs": 64} | {f"spin/{name}": v for name, v in values.items()}
