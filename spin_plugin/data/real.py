"""`real/`: prompts and real responses, tokenised once for the whole run by Axolotl itself."""

import copy
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from spin_plugin.args import SpinArgs
from spin_plugin.console import SpinError, say
from spin_plugin.data.examples import ExampleCounts, find_end_tokens, write_examples
from spin_plugin.data.table import open_table
from spin_plugin.run.atomic import write_dir_atomically
from spin_plugin.run.directory import RunDir

LOG = logging.getLogger(__name__)
# Axolotl drops or truncates what is longer than sequence_len; SPIN counts it, and a truncated answer is no answer.
NO_LIMIT = 10_000_000
# What Axolotl's loaders and prompt formats raise for data that does not fit the configuration.
DATA_ERRORS = (
    DatasetsError, TemplateError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    RuntimeError, ZeroDivisionError, NotImplementedError,
    StopIteration,  # what `datasets` raises for an empty JSON file
)  # fmt: skip


@dataclass(frozen=True)
class Real:
    """The run's examples, memory-mapped."""

    train: Dataset
    eval: Dataset | None
    stop_tokens: list[int]
    """Where generation stops: what the real responses end with, and the tokenizer's eos."""


def prepare_real(cfg: Any, run: RunDir, spin: SpinArgs) -> Real:
    """Tokenise the datasets of the configuration on the run's first start; open them afterwards.

    Raises:
        SpinError: a dataset cannot be loaded, or holds nothing that SPIN can use.
    """
    meta = run.real / "meta.json"
    if not meta.exists():
        _tokenise(cfg, run, spin)
    content = json.loads(meta.read_text(encoding="utf-8"))
    return Real(
        train=open_table(run.real / "train.arrow"),
        eval=open_table(run.real / "eval.arrow") if content["eval"] else None,
        stop_tokens=content["stop_tokens"],
    )


def _tokenise(cfg: Any, run: RunDir, spin: SpinArgs) -> None:
    from axolotl.loaders import load_tokenizer

    if cfg.added_tokens_overrides and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpinError(  # Axolotl lets all processes meet when it changes the tokenizer's files; here one works alone
            "added_tokens_overrides: with several processes run `axolotl preprocess` first, then the same command again"
        )
    run.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".prepared-") as prepared:
        rows = _load_rows(cfg, prepared)
        tokenizer = load_tokenizer(cfg)
        write_dir_atomically(run.real, lambda directory: _write_real(cfg, spin, tokenizer, rows, directory))


def _load_rows(cfg: Any, prepared: str) -> dict[str, Dataset]:
    """Axolotl's own tokenised rows, nothing truncated and no stale cache used."""
    from axolotl.common.datasets import load_datasets

    unlimited = copy.deepcopy(cfg)
    unlimited.sequence_len = NO_LIMIT
    unlimited.eval_sequence_len = None
    unlimited.excess_length_strategy = "drop"
    unlimited.dataset_prepared_path = prepared
    unlimited.push_dataset_to_hub = None
    try:
        meta = load_datasets(cfg=unlimited)
    except DATA_ERRORS as error:
        LOG.debug("loading the datasets failed", exc_info=True)
        paths = ", ".join(str(entry["path"]) for entry in cfg.datasets)
        first: BaseException = error
        while first.__cause__ is not None:  # `datasets` wraps what names the line
            first = first.__cause__
        reason = " ".join(str(first).split())[:300] or "the file is empty"
        raise SpinError(f"datasets: {paths} could not be loaded: {type(first).__name__}: {reason}") from error
    return {
        split: rows for split, rows in (("train", meta.train_dataset), ("eval", meta.eval_dataset)) if rows is not None
    }


def _write_real(cfg: Any, spin: SpinArgs, tokenizer: Any, rows: dict[str, Dataset], directory: Path) -> None:
    """Examples of both splits, and where their real responses end."""
    counts = {
        split: write_examples(dataset, directory / f"{split}.arrow", turns=spin.turns, sequence_len=cfg.sequence_len)
        for split, dataset in rows.items()
    }
    _require_examples(counts["train"], cfg.sequence_len)
    train = open_table(directory / "train.arrow")
    _require_vocabulary(cfg, train)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ends = find_end_tokens(train, counts["train"].ends, special)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    content = {
        "stop_tokens": list(dict.fromkeys([*ends, *eos])),
        "eval": "eval" in counts and counts["eval"].examples > 0,
    }
    (directory / "meta.json").write_text(json.dumps(content), encoding="utf-8")
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ends)
    say(f"{counts['train'].described()}; real responses end with {shown}")
    if "eval" in counts:
        say(f"held out: {counts['eval'].described()}")


def _require_examples(counts: ExampleCounts, sequence_len: int) -> None:
    """Say which kind of nothing a dataset without a usable example holds."""
    if counts.examples:
        return
    if not counts.rows:
        raise SpinError("datasets: there are no rows")
    if counts.too_long:
        raise SpinError(
            f"datasets: every prompt with its response is longer than sequence_len ({sequence_len}); raise it"
        )
    if counts.no_prompt:
        raise SpinError("datasets: no row has a prompt before its response; SPIN needs an instruction or chat format")
    raise SpinError("datasets: no row has an assistant turn that the labels train on")


def _require_vocabulary(cfg: Any, train: Dataset) -> None:
    """Every prompt must consist of tokens that the model has an embedding for."""
    import pyarrow.compute as pc
    from axolotl.loaders.utils import load_model_config

    config = load_model_config(cfg)
    size = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(pc.max(pc.list_flatten(train.data.column(name))).as_py() for name in ("prompt", "real"))
    if size is not None and highest >= size:
        raise SpinError(
            f"datasets: token id {highest} lies outside the vocabulary of {cfg.base_model} ({size}); "
            "train new tokens by SFT first, then start SPIN from that model"
        )
