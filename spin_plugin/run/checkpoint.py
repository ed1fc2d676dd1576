"""Whether a directory holds a model that can be loaded, or a checkpoint to go on from; found out without torch."""

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError

# What transformers, FSDP and DeepSpeed call the parts of a checkpoint.
CHECKPOINT_PARTS = {
    "weights": ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model_fsdp*", "global_step*"),
    "optimizer's state": ("*optimizer*", "global_step*"),
    "schedule": ("scheduler.pt", "global_step*"),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_model_dir(path: Path, *, adapter: bool = False, tokenizer_elsewhere: bool = False) -> list[Path]:
    """Look for everything a model (or an adapter) needs; vLLM loads some damaged ones without a word.

    Returns:
        the files with its weights.

    Raises:
        SpinError: names the file that is missing or damaged.
    """
    config, weights = ("adapter_config.json", "adapter_model") if adapter else ("config.json", "model")
    if not (path / config).is_file():
        raise SpinError(f"{path} holds no {config}: it is not a finished model; point base_model at one")
    if not (adapter or tokenizer_elsewhere) and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise SpinError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, …); copy the model's there")
    for file in sorted(path.glob("*.json")):
        _read_json(file)
    return check_weights(path, weights)


def why_incomplete(checkpoint: Path) -> str | None:
    """What keeps training from going on from a checkpoint; None where all of it is there.

    transformers writes trainer_state.json last, but nobody waits for the disk: after a power cut it says nothing
    about the other files. And without the optimizer's state (`save_only_model`) a checkpoint is only a model.
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
        raise SpinError(f"{state} is of another step")
    for what, patterns in CHECKPOINT_PARTS.items():
        if not any(file for pattern in patterns for file in path.glob(pattern)):
            raise SpinError(f"{path} holds no {what}")
    for stem in ("model", "adapter_model"):
        if any(path.glob(f"{stem}*.safetensors")):
            check_weights(path, stem)
    for file in sorted(path.glob("*.json")):
        _read_json(file)
    for file in sorted(path.rglob("*")):
        # What torch saves is a zip archive, whose directory stands at its end.
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            raise SpinError(f"{file} is truncated")


def check_weights(path: Path, stem: str) -> list[Path]:
    """Look whether the safetensors files of a directory are whole and hold what its index promises.

    Returns:
        the files.

    Raises:
        SpinError: there are none, or names the one that is missing, damaged, or lacks a tensor.
    """
    index = path / f"{stem}.safetensors.index.json"
    if not index.is_file():
        files = sorted(path.glob(f"{stem}*.safetensors"))
        if not files:
            raise SpinError(
                f"{path} holds no {stem}.safetensors; save the model as safetensors (pickled weights are refused)"
            )
        for file in files:
            check_safetensors(file)
        return files
    content = _read_json(index)
    promised = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(promised, dict) and promised and all(isinstance(name, str) for name in promised.values())):
        raise SpinError(f"{index} is damaged; copy the model anew")
    held = {name: check_safetensors(path / name) for name in sorted(set(promised.values()))}
    if missing := sorted(tensor for tensor, name in promised.items() if tensor not in held[name]):
        raise SpinError(f"{path / promised[missing[0]]} lacks the tensor {missing[0]}; copy the model anew")
    return [path / name for name in held]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise SpinError(f"{file} is damaged; copy the model anew") from None


def check_safetensors(file: Path) -> Mapping[str, Any]:
    """Compare a file's size with what its header promises (8 bytes length, JSON header, tensor data).

    Returns:
        the header: type, shape and place of every tensor by its name.

    Raises:
        SpinError: the file is missing, truncated or no safetensors file.
    """
    if not file.is_file():
        raise SpinError(f"{file} is missing; copy the model anew")
    size = file.stat().st_size
    try:
        with open(file, "rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            if length > size - 8:
                raise SpinError(f"{file} is truncated: its header does not fit into its {size} bytes; copy it anew")
            header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise SpinError(f"{file} is not a readable safetensors file; copy it anew") from None
    if size != expected:
        raise SpinError(f"{file} is truncated: {size} bytes where its header promises {expected}; copy it anew")
    return header
