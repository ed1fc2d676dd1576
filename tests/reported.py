"""Run directories as training leaves them, of any size, without training: for the report's tests and its benchmark."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from datasets import Dataset
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from spin_plugin import __version__
from spin_plugin.data.pairs import Synthetic, build_pairs, write_stats
from spin_plugin.data.table import EXAMPLE_SCHEMA, open_table, table_writer
from spin_plugin.generation.job import SHARD
from spin_plugin.generation.shards import Shards
from spin_plugin.objective.metrics import METRICS
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.state import RunState

END = 258  # `</s>` of tiny.byte_tokenizer; a response without it was truncated
Tokens = list[int]
Answer = Callable[[str, int, int], Sequence[Tokens]]
"""Split, position of a prompt in it, iteration → the synthetic responses."""


class Examples(NamedTuple):
    """Prompts and real responses of both splits."""

    train: Sequence[tuple[Tokens, Tokens]]
    eval: Sequence[tuple[Tokens, Tokens]]


def make_run(
    root: Path, tokenizer: PreTrainedTokenizerBase, examples: Examples, answer: Answer, *, iterations: int
) -> RunDir:
    """Write a run with finished iterations, with rewards that are a function of the pair (`reward_of`).

    Its configuration is `config.yml` beside `root`.
    """
    run = RunDir(root)
    run.real.mkdir(parents=True)
    for split, rows in examples._asdict().items():
        with table_writer(run.real / f"{split}.arrow", EXAMPLE_SCHEMA) as write:
            for start in range(0, len(rows), 1024):
                prompts, reals = zip(*rows[start : start + 1024], strict=True)
                write({"prompt": prompts, "real": reals, "row": list(range(start, start + len(prompts)))})
    (run.real / "meta.json").write_text(json.dumps({"stop_tokens": [END], "eval": bool(examples.eval)}))
    config = {
        "base_model": "model",
        "output_dir": str(root),
        "plugins": ["spin_plugin.SpinPlugin"],
        "rl": "spin",
        "spin": {"iterations": iterations},
    }
    entries = []
    for number in range(iterations):
        here = run.iteration(number)
        _write_iteration(run, number, tokenizer, answer)
        here.config.write_text(yaml.safe_dump(config))
        stats = json.loads((here.pairs / "stats.json").read_text())
        entries.append({"iteration": number, "pairs": stats, "metrics": here.last_metrics()})
    run.write_state(RunState(config, entries, __version__))
    (root.parent / "config.yml").write_text(yaml.safe_dump(config))
    return run


def add_to_entries(run: RunDir, **more: Any) -> None:
    """Add to each finished iteration's entry in run.json."""
    state = run.read_state()
    assert state is not None
    state.finished = [entry | more for entry in state.finished]
    run.write_state(state)


def write_rewards(here: IterationDir, split: str, rewards: np.ndarray) -> None:
    """Write the rewards [N, 2] of a split's pairs."""
    save_file({"rewards": rewards.astype(np.float32)}, here.pairs / f"rewards-{split}.safetensors")


def reward_of(index: int, iteration: int) -> tuple[float, float]:
    """Return the rewards of a pair's real and synthetic response."""
    return (index * 37 % 101 - 50) / 50 + iteration, (index * 53 % 103 - 70) / 50


def _write_iteration(run: RunDir, number: int, tokenizer: PreTrainedTokenizerBase, answer: Answer) -> None:
    here, stats = run.iteration(number), {}
    for directory in (here.synthetic, here.pairs):
        directory.mkdir(parents=True)
    tokenizer.save_pretrained(here.path)
    examples = {split: open_table(run.real / f"{split}.arrow") for split in Examples._fields}
    responses = list(_responses(number, examples, answer))
    here.synthetic.joinpath("job.json").write_text(json.dumps({"requests": len(responses)}))
    for shard in range(0, len(responses), SHARD):
        Shards(here.synthetic).write(shard // SHARD, responses[shard : shard + SHARD])
    for split, rows in examples.items():
        synthetic = (
            Synthetic(one["example"], number, one["tokens"], one["finish"] == "length")
            for one in responses
            if one["split"] == split
        )
        stats[split] = build_pairs(
            rows, synthetic, here.pairs / f"{split}.arrow", end_tokens=[END], sequence_len=1 << 20, keep_equal=True
        )
        rewards = [reward_of(index, number) for index in range(stats[split].pairs)]
        write_rewards(here, split, np.array(rewards).reshape(-1, 2))
    write_stats(here.pairs / "stats.json", stats)
    here.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in _log(number)))


def _responses(number: int, examples: dict[str, Dataset], answer: Answer) -> Iterator[dict[str, Any]]:
    for split, rows in examples.items():
        for example in range(len(rows)):
            for tokens in answer(split, example, number):
                finish = "stop" if tokens[-1:] == [END] else "length"
                yield {"split": split, "example": example, "tokens": tokens, "finish": finish, "stop": None}


def _log(seed: int, steps: int = 100) -> Iterator[dict[str, float]]:
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        margin = 2 * step / steps + random.normal(0, 0.2)
        values = dict.fromkeys(METRICS, -0.5) | {
            "loss": float(np.log1p(np.exp(-margin))),
            "reward_margin": margin,
            "reward_real": margin / 4,
            "reward_synthetic": -margin * 0.75,
            "accuracy": float(np.clip(0.5 + margin / 4, 0, 1)),
        }
        yield {"step": step, "epoch": step / steps, "pairs": 64} | {f"spin/{name}": v for name, v in values.items()}
