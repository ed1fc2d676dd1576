"""Axolotl's own loaders: the datasets and the tokenizer of a configuration, and what it says of the model."""

import copy
import logging
import os
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from spin_plugin.console import SpinError

LOG = logging.getLogger(__name__)
# Axolotl drops or truncates what is longer than sequence_len; SPIN counts it, and a truncated answer is no answer.
NO_LIMIT = 10_000_000
# What Axolotl's loaders and prompt formats raise for data that does not fit the configuration.
DATA_ERRORS = (
    DatasetsError, TemplateError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    RuntimeError, ZeroDivisionError, NotImplementedError,
    StopIteration,  # what `datasets` raises for an empty JSON file
)  # fmt: skip


class AxolotlSource:
    """The datasets and the tokenizer of Axolotl's validated configuration (`data.real.Source`)."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def rows(self, directory: str) -> dict[str, Dataset]:
        """Axolotl's own tokenised rows, nothing truncated and no stale cache used.

        Raises:
            SpinError: a dataset cannot be loaded.
        """
        from axolotl.common.datasets import load_datasets

        if self.cfg.added_tokens_overrides and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SpinError(  # Axolotl lets all processes meet when it changes the tokenizer's files; one is alone here
                "added_tokens_overrides: with several processes run `axolotl preprocess` first, then rerun this command"
            )
        unlimited = copy.deepcopy(self.cfg)
        unlimited.sequence_len = NO_LIMIT
        unlimited.eval_sequence_len = None
        unlimited.excess_length_strategy = "drop"
        unlimited.dataset_prepared_path = directory
        unlimited.push_dataset_to_hub = None
        try:
            meta = load_datasets(cfg=unlimited)
        except DATA_ERRORS as error:
            LOG.debug("loading the datasets failed", exc_info=True)
            paths = ", ".join(str(entry["path"]) for entry in self.cfg.datasets)
            first: BaseException = error
            while first.__cause__ is not None:  # `datasets` wraps what names the line
                first = first.__cause__
            reason = " ".join(str(first).split())[:300] or "the file is empty"
            raise SpinError(f"datasets: {paths} could not be loaded: {type(first).__name__}: {reason}") from error
        splits = {"train": meta.train_dataset, "eval": meta.eval_dataset}
        return {split: rows for split, rows in splits.items() if rows is not None}

    def tokenizer(self) -> Any:
        from axolotl.loaders import load_tokenizer

        return load_tokenizer(self.cfg)

    def vocabulary(self) -> int | None:
        """The size that the model's configuration names."""
        from axolotl.loaders.utils import load_model_config

        return getattr(load_model_config(self.cfg).get_text_config(), "vocab_size", None)


def stored_dtype(cfg: Any) -> str:
    """The number format that the base model's configuration names, for example `bfloat16`."""
    from axolotl.loaders.utils import load_model_config

    return str(load_model_config(cfg).dtype).removeprefix("torch.")
