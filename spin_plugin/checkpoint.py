"""Whether a directory holds a model that can be loaded, found out in milliseconds and without torch."""

import json
import struct
from pathlib import Path

from spin_plugin.messages import SpinError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_model_dir(path: Path, *, adapter: bool = False, tokenizer_elsewhere: bool = False) -> None:
    """Look for everything a model (or an adapter) needs; vLLM loads some damaged ones without a word.

    Raises:
        SpinError: names the file that is missing or damaged.
    """
    config, weights = ("adapter_config.json", "adapter_model") if adapter else ("config.json", "model")
    if not (path / config).is_file():
        raise SpinError(f"{path} holds no {config}: it is not a finished model; point base_model at one")
    if not (adapter or tokenizer_elsewhere) and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise SpinError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, …); copy the model's there")
    for file in _weight_files(path, weights):
        check_safetensors(file)


def _weight_files(path: Path, stem: str) -> list[Path]:
    """The safetensors files a directory says it has."""
    index = path / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not names:
                raise KeyError("weight_map")
            return sorted(path / name for name in names)
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
            raise SpinError(f"{index} is damaged; copy the model anew") from None
    files = sorted(path.glob(f"{stem}*.safetensors"))
    if not files:
        raise SpinError(
            f"{path} holds no {stem}.safetensors; save the model as safetensors (pickled weights are refused)"
        )
    return files


def check_safetensors(file: Path) -> None:
    """Compare a file's size with what its header promises (8 bytes length, JSON header, tensor data).

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
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise SpinError(f"{file} is not a readable safetensors file; copy it anew") from None
    if size != expected:
        raise SpinError(f"{file} is truncated: {size} bytes where its header promises {expected}; copy it anew")
