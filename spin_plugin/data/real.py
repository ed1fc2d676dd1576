"""`real/`: prompts and real responses, tokenized by Axolotl once per run."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset

from spin_plugin.args import SpinArgs
from spin_plugin.config.specs import DataSpec
from spin_plugin.console import SpinError, note, say
from spin_plugin.data.examples import (
    FEWEST_HELD_OUT,
    ExampleCounts,
    choose_held_out,
    find_end_tokens,
    write_examples,
)
from spin_plugin.data.table import open_table
from spin_plugin.run.atomic import write_dir_atomically
from spin_plugin.run.directory import RunDir


@dataclass(frozen=True)
class Real:
    """The run's examples, memory-mapped."""

    train: Dataset
    eval: Dataset | None
    stop_tokens: list[int]
    """Tokens at which generation stops: those that end the real responses, and the tokenizer's EOS."""


class Source(Protocol):
    """The configuration's datasets and tokenizer, loaded by Axolotl (`training/loading.py`)."""

    def rows(self, directory: str) -> dict[str, Dataset]:
        """Return the tokenized, untruncated SFT rows (input_ids, labels) of each split.

        Args:
            directory: for temporary files.
        """

    def tokenizer(self) -> Any: ...

    def vocabulary(self) -> int | None:
        """Return the number of token embeddings of the model, or None if its configuration does not say."""


def prepare_real(source: Source, run: RunDir, spin: SpinArgs, data: DataSpec) -> Real:
    """Return the run's examples, tokenizing the configured datasets on the first start.

    Args:
        source: the configured datasets.
        run: the run directory.
        spin: the `spin:` block of the first iteration; later ones reuse what is on disk.
        data: lengths and seeds.

    Raises:
        SpinError: a dataset cannot be loaded, or has no usable example.
    """
    meta = run.real / "meta.json"
    if not meta.exists():
        _tokenize(source, run, spin, data)
    content = json.loads(meta.read_text(encoding="utf-8"))
    return Real(
        train=open_table(run.real / "train.arrow"),
        eval=open_table(run.real / "eval.arrow") if content["eval"] else None,
        stop_tokens=content["stop_tokens"],
    )


def _tokenize(source: Source, run: RunDir, spin: SpinArgs, data: DataSpec) -> None:
    run.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".prepared-") as prepared:
        rows = source.rows(prepared)
        write_dir_atomically(run.real, lambda directory: _write_real(source, rows, directory, spin, data))


def _write_real(source: Source, rows: dict[str, Dataset], directory: Path, spin: SpinArgs, data: DataSpec) -> None:
    """Write the examples of both splits and the stop tokens."""
    splits = rows if "eval" in rows else _hold_out(rows["train"], spin, data.seed)
    counts = {
        split: write_examples(dataset, directory / f"{split}.arrow", turns=spin.turns, sequence_len=data.sequence_len)
        for split, dataset in splits.items()
    }
    _require_examples(counts["train"], data.sequence_len)
    train = open_table(directory / "train.arrow")
    _require_vocabulary(source, train)
    tokenizer = source.tokenizer()
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ends = find_end_tokens(train, counts["train"].ends, special)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    content = {
        "stop_tokens": list(dict.fromkeys([*ends, *eos])),
        "eval": "eval" in counts and counts["eval"].examples > 0,
    }
    (directory / "meta.json").write_text(json.dumps(content), encoding="utf-8")
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ends)
    say(f"{counts['train'].summary()}; real responses end with {shown}")
    ours = "" if "eval" in rows else f", to check every iteration (spin.held_out: {spin.held_out:g}; 0 disables this)"
    if "eval" in counts:
        note(f"held-out split: {counts['eval'].summary()}{ours}")
    elif spin.held_out:
        say(
            f"fewer than {2 * FEWEST_HELD_OUT} rows: none is held out, so it is not checked whether an iteration makes "
            "the model worse"
        )


def _hold_out(rows: Dataset, spin: SpinArgs, seed: int) -> dict[str, Dataset]:
    """Split rows into those to train on and, unless there are too few, held-out ones."""
    held_out = choose_held_out(len(rows), spin.held_out, num_prompts=spin.num_prompts, seed=seed)
    if not len(held_out):
        return {"train": rows}
    return {"train": rows.select(np.setdiff1d(np.arange(len(rows)), held_out)), "eval": rows.select(held_out)}


def _require_examples(counts: ExampleCounts, sequence_len: int) -> None:
    """Raise a SpinError that says why there is no usable example."""
    if counts.examples:
        return
    if not counts.rows:
        raise SpinError("datasets: no rows; check path and split")
    if counts.too_long:
        raise SpinError(f"datasets: no example fits in sequence_len ({sequence_len}); raise sequence_len")
    if counts.no_prompt:
        raise SpinError("datasets: no row has a prompt before its response; use an instruction or chat format")
    raise SpinError("datasets: no row has a response that the labels train on; check the dataset's type and roles")


def _require_vocabulary(source: Source, train: Dataset) -> None:
    """Raise a SpinError if an example contains a token that the model has no embedding for."""
    import pyarrow.compute as pc

    size = source.vocabulary()
    highest = max(pc.max(pc.list_flatten(train.data.column(name))).as_py() for name in ("prompt", "real"))
    if size is not None and highest >= size:
        raise SpinError(
            f"datasets: token id {highest} is outside the vocabulary of base_model ({size} tokens); train new tokens "
            "with SFT first, then start SPIN from that model"
        )
