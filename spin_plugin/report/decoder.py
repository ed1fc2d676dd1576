"""Tokens → text, with the tokenizer that the run itself saved."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spin_plugin.console import warn
from spin_plugin.run.directory import RunDir

Decode = Callable[[Sequence[int]], str]


def decoder(run: RunDir, config: dict[str, Any]) -> Decode:
    """Return a function that turns token ids into text, special tokens included.

    Args:
        run: the run directory; the newest iteration that holds a tokenizer has the one to use.
        config: the run's configuration, which names the tokenizer until an iteration has saved it.
    """
    directories = [run.iteration(number).path for number in reversed(run.started())]
    if named := config.get("tokenizer_config") or config.get("base_model"):
        directories.append(Path(named))
    for directory in directories:
        if (file := directory / "tokenizer.json").exists():
            from tokenizers import Tokenizer  # transformers, which loads torch, takes ten seconds to import

            try:
                fast = Tokenizer.from_file(str(file))
            except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more specific
                return _ids(str(file), error)
            return lambda tokens: fast.decode(list(tokens), skip_special_tokens=False)
    return _by_transformers(named) if named else json.dumps


def _by_transformers(name: str) -> Decode:
    """Load a tokenizer that has no tokenizer.json, or is on the hub, never with code of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        return _ids(name, error)
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _ids(name: str, error: Exception) -> Decode:
    """Show token ids instead of text, with a warning that says why."""
    reason = str(error).strip().partition("\n")[0]
    warn(f"report: the tokenizer {name} cannot be loaded, so the report shows token ids: {reason}")
    return json.dumps
