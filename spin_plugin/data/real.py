"""`real/`: prompts and real responses, tokenized by Axolotl once per run."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from datasets import Dataset

from spin_plugin.console import SpinError, say
from spin_plugin.data.examples import ExampleCounts, find_end_tokens, write_examples
from spin_plugin.data.table import open_table
from spin_plugin.run.atomic import write_dir_atomically
from spin_plugin.run.directory import RunDir

Turns = Literal["first", "last", "all"]


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


def prepare_real(source: Source, run: RunDir, *, turns: Turns, sequence_len: int) -> Real:
    """Return the run's examples, tokenizing the configured datasets on the first start.

    Raises:
        SpinError: a dataset cannot be loaded, or has no usable example.
    """
    meta = run.real / "meta.json"
    if not meta.exists():
        _tokenize(source, run, turns, sequence_len)
    content = json.loads(meta.read_text(encoding="utf-8"))
    return Real(
        train=open_table(run.real / "train.arrow"),
        eval=open_table(run.real / "eval.arrow") if content["eval"] else None,
        stop_tokens=content["stop_tokens"],
    )


def _tokenize(source: Source, run: RunDir, turns: Turns, sequence_len: int) -> None:
    run.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".prepared-") as prepared:
        rows = source.rows(prepared)
        write_dir_atomically(
            run.real, lambda directory: _write_real(source, rows, directory, turns=turns, sequence_len=sequence_len)
        )


def _write_real(source: Source, rows: dict[str, Dataset], directory: Path, *, turns: Turns, sequence_len: int) -> None:
    """Write the examples of both splits and the stop tokens."""
    counts = {
        split: write_examples(dataset, directory / f"{split}.arrow", turns=turns, sequence_len=sequence_len)
        for split, dataset in rows.items()
    }
    _require_examples(counts["train"], sequence_len)
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
    if "eval" in counts:
        say(f"held-out split: {counts['eval'].summary()}")


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
