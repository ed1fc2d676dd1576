"""A base model on the hub: which commit its name stands for, and how large it is, as transformers would find it."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError


def commit_of(model: str, revision: str | None) -> str:
    """The commit that transformers would load now; offline the one in the cache.

    Args:
        model: a name on the hub.
        revision: a branch, a tag or a commit; None: the main branch.

    Raises:
        SpinError: neither the hub nor the cache has it.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        commit = extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
    except (OSError, RuntimeError) as error:  # without a network huggingface_hub closes its own client and goes on
        raise SpinError(
            f"base_model: {model} is no directory, and not found on the hub: {error}; without a network, set "
            "HF_HUB_OFFLINE=1 to load it from the cache"
        ) from None
    if commit is None:
        raise SpinError(f"base_model: the hub does not say which commit of {model} this is; name a downloaded copy")
    return commit


def bytes_of_weights(model: str, commit: str | None) -> int:
    """Size of the safetensors of a model on the hub; 0 where it has none. A single file that is not in the cache yet is
    downloaded: vLLM and training need it, too."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    with suppress(OSError, RuntimeError, KeyError):
        index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, revision=commit)
        return int(json.loads(Path(str(index)).read_text(encoding="utf-8"))["metadata"]["total_size"])
    with suppress(OSError, RuntimeError):
        return Path(str(cached_file(model, SAFE_WEIGHTS_NAME, revision=commit))).stat().st_size
    return 0


def pin(cfg: Any, commit: str | None) -> None:
    """Have training load this commit of the base model, though the branch may move meanwhile. Axolotl asks for the
    same revision of the tokenizer, so one from another place on the hub leaves both unpinned."""
    elsewhere = cfg.tokenizer_config not in (None, cfg.base_model) and not Path(cfg.tokenizer_config).is_dir()
    if commit and not elsewhere:
        cfg.revision_of_model = commit
