"""A base model on the hub: the commit its name resolves to in transformers, and the size of its weights."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError


def commit_of(model: str, revision: str | None) -> str:
    """Return the commit that transformers would load now; offline, the cached one.

    Args:
        model: a name on the hub.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        SpinError: neither the hub nor the cache has it.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        commit = extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
    except (OSError, RuntimeError) as error:  # RuntimeError: offline, huggingface_hub reuses a client it closed
        raise SpinError(
            f"base_model: {model} is neither a directory nor a model on the hub: {error}; without a network, set "
            "HF_HUB_OFFLINE=1 to load it from the cache"
        ) from None
    if commit is None:
        raise SpinError(f"base_model: the hub returned no commit for {model}; download it and use its path")
    return commit


def bytes_of_weights(model: str, commit: str | None) -> int:
    """Return the size of a hub model's safetensors in bytes; 0 if it has none.

    A single file that is not cached is downloaded: vLLM and training need it anyway.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    with suppress(OSError, RuntimeError, KeyError):
        index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, revision=commit)
        return int(json.loads(Path(str(index)).read_text(encoding="utf-8"))["metadata"]["total_size"])
    with suppress(OSError, RuntimeError):
        return Path(str(cached_file(model, SAFE_WEIGHTS_NAME, revision=commit))).stat().st_size
    return 0


def pin(cfg: Any, commit: str | None) -> None:
    """Make training load this commit of the base model even if the branch moves.

    Axolotl loads the tokenizer at the same revision, so a tokenizer from another hub repository leaves both unpinned.
    """
    elsewhere = cfg.tokenizer_config not in (None, cfg.base_model) and not Path(cfg.tokenizer_config).is_dir()
    if commit and not elsewhere:
        cfg.revision_of_model = commit
