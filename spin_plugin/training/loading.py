"""Axolotl's own loaders for a configuration's datasets and tokenizer, and fields of its model configuration."""

import copy
import logging
import os
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from spin_plugin.console import SpinError

LOG = logging.getLogger(__name__)
# Stops Axolotl from dropping or truncating long rows: SPIN counts them, and a truncated response is unusable.
NO_LIMIT = 10_000_000
# Raised by Axolotl's loaders and prompt formats for data that does not fit the configuration.
DATA_ERRORS = (
    DatasetsError, TemplateError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    RuntimeError, ZeroDivisionError, NotImplementedError,
    StopIteration,  # raised by `datasets` for an empty JSON file
)  # fmt: skip


class AxolotlSource:
    """The datasets and tokenizer of Axolotl's validated configuration (`data.real.Source`)."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def rows(self, directory: str) -> dict[str, Dataset]:
        """Return the rows that Axolotl tokenizes, untruncated and never from a stale cache.

        Raises:
            SpinError: a dataset cannot be loaded.
        """
        from axolotl.common.datasets import load_datasets

        if self.cfg.added_tokens_overrides and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SpinError(  # Axolotl waits at a barrier, which only one rank reaches here
                "added_tokens_overrides: needs a single process; run `axolotl preprocess` first, then this command"
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
            while first.__cause__ is not None:  # the innermost error names the line
                first = first.__cause__
            reason = " ".join(str(first).split())[:300] or "the file is empty"
            raise SpinError(f"datasets: {paths} could not be loaded: {type(first).__name__}: {reason}") from error
        splits = {"train": meta.train_dataset, "eval": meta.eval_dataset}
        return {split: rows for split, rows in splits.items() if rows is not None}

    def tokenizer(self) -> Any:
        from axolotl.loaders import load_tokenizer

        return load_tokenizer(self.cfg)

    def vocabulary(self) -> int | None:
        """Return the vocabulary size in the model's configuration."""
        from axolotl.loaders.utils import load_model_config

        return getattr(load_model_config(self.cfg).get_text_config(), "vocab_size", None)


def stored_dtype(cfg: Any) -> str:
    """Return the dtype in the base model's configuration, for example `bfloat16`."""
    from axolotl.loaders.utils import load_model_config

    return str(load_model_config(cfg).dtype).removeprefix("torch.")
