"""Check without torch that a directory holds a loadable model or a resumable checkpoint."""

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError

# File names that transformers, FSDP and DeepSpeed use for the parts of a checkpoint.
CHECKPOINT_PARTS = {
    "weights": ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    "optimizer state": ("*optimizer*", "global_step*"),
    "schedule": ("scheduler.pt", "global_step*"),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_model_dir(path: Path, *, adapter: bool = False, tokenizer_elsewhere: bool = False) -> list[Path]:
    """Check that all files of a model (or adapter) exist and are intact; vLLM loads some damaged ones without an error.

    Returns:
        The weight files.

    Raises:
        SpinError: a file is missing or damaged.
    """
    config, weights = ("adapter_config.json", "adapter_model") if adapter else ("config.json", "model")
    if not (path / config).is_file():
        raise SpinError(f"{path}: no {config}, so this is not a finished model; point base_model at one")
    if not (adapter or tokenizer_elsewhere) and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise SpinError(f"{path}: no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, …); copy the model's tokenizer there")
    for file in sorted(path.glob("*.json")):
        _read_json(file)
    return check_weights(path, weights)


def incomplete_reason(checkpoint: Path) -> str | None:
    """Return why training cannot resume from a checkpoint, or None if it is complete.

    transformers writes trainer_state.json last but does not fsync, so after a power loss the file does not prove that
    the others are complete. A checkpoint without optimizer state (`save_only_model`) is only a model.
    """
    try:
        _check_checkpoint(checkpoint)
    except SpinError as error:
        return str(error)
    return None


def _check_checkpoint(path: Path) -> None:
    state = path / "trainer_state.json"
    if not state.is_file():
        raise SpinError(f"{state} is missing")
    content = _read_json(state)
    if not isinstance(content, dict) or f"checkpoint-{content.get('global_step')}" != path.name:
        raise SpinError(f"{state} belongs to another step")
    for what, patterns in CHECKPOINT_PARTS.items():
        if not any(file for pattern in patterns for file in path.glob(pattern)):
            raise SpinError(f"{path}: no {what}")
    for stem in ("model", "adapter_model"):
        if any(path.glob(f"{stem}*.safetensors")):
            check_weights(path, stem)
    for file in sorted(path.glob("*.json")):
        _read_json(file)
    for file in sorted(path.rglob("*")):
        # torch.save writes a zip archive, whose index comes last: a truncated file is not a valid zip.
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            raise SpinError(f"{file} is truncated")


def check_weights(path: Path, stem: str) -> list[Path]:
    """Check that a directory's safetensors files are intact and contain every tensor of its index.

    Returns:
        The weight files.

    Raises:
        SpinError: there are none, or one is missing, damaged, or lacks a tensor.
    """
    index = path / f"{stem}.safetensors.index.json"
    if not index.is_file():
        files = sorted(path.glob(f"{stem}*.safetensors"))
        if not files:
            raise SpinError(
                f"{path}: no {stem}.safetensors; save the model as safetensors (pickled weights are refused)"
            )
        for file in files:
            check_safetensors(file)
        return files
    content = _read_json(index)
    indexed = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(indexed, dict) and indexed and all(isinstance(name, str) for name in indexed.values())):
        raise SpinError(f"{index} is damaged; copy the model again")
    held = {name: check_safetensors(path / name) for name in sorted(set(indexed.values()))}
    if missing := sorted(tensor for tensor, name in indexed.items() if tensor not in held[name]):
        raise SpinError(f"{path / indexed[missing[0]]} lacks the tensor {missing[0]}; copy the model again")
    return [path / name for name in held]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise SpinError(f"{file} is damaged; copy the model again") from None


def check_safetensors(file: Path) -> Mapping[str, Any]:
    """Compare a file's size with the one its header implies (8-byte length, JSON header, tensor data).

    Returns:
        The header: dtype, shape and offsets of each tensor by name.

    Raises:
        SpinError: the file is missing, truncated or not a safetensors file.
    """
    if not file.is_file():
        raise SpinError(f"{file} is missing; copy the model again")
    size = file.stat().st_size
    try:
        with open(file, "rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            if length > size - 8:
                raise SpinError(f"{file} is truncated: its header exceeds its {size} bytes; copy it again")
            header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise SpinError(f"{file} is not a readable safetensors file; copy it again") from None
    if size != expected:
        raise SpinError(f"{file} is truncated: {size} bytes instead of {expected}; copy it again")
    return header
