"""What an iteration saves: checkpoints, and weights in 16 bits."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from spin_plugin.console import SpinError
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.checkpoint import check_safetensors


def fix_mtimes(checkpoints: list[Path]) -> None:
    """Give checkpoints, sorted by step, ascending modification times that are not in the future.

    transformers 5.16 removes the oldest by modification time (`rotate_checkpoints(use_mtime=True)`).
    """
    times = [path.stat().st_mtime for path in checkpoints]
    if times and (max(times) > time.time() or times != sorted(times)):
        for path in checkpoints:
            step = int(path.name.rpartition("-")[2])
            os.utime(path, (step, step))


@contextmanager
def disk_errors(directory: str) -> Iterator[None]:
    """Turn the write errors of safetensors and torch into a message with the directory and its free space."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not re.search(r"os error \d|PytorchStreamWriter|inline_container", str(error)):
            raise
        free = shutil.disk_usage(directory).free / 1e9
        raise SpinError(
            f"{directory}: could not be written ({free:.1f} GB free): {str(error)[:200]}; free some space, then rerun "
            "the same command, which resumes from the last complete checkpoint"
        ) from None


def store_in_16_bits(directory: Path, files: Iterable[Path], dtype: torch.dtype, kept: Iterable[str]) -> None:
    """Convert the fp32 tensors in a model's safetensors files to 16 bits; replace one file at a time, atomically.

    Args:
        directory: the model's directory.
        files: its safetensors files.
        dtype: bfloat16 or float16.
        kept: names of tensors that the architecture keeps in fp32.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    kept, files = set(kept), list(files)
    for file in files:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata()
        masters = [name for name, tensor in tensors.items() if tensor.dtype == torch.float32 and name not in kept]
        if not masters:
            continue
        for name in masters:  # one at a time: a file can hold 50 GB
            tensors[name] = tensors[name].to(dtype)
        rounded = file.with_name(f".{file.name}.16")
        save_file(tensors, rounded, metadata)
        rounded.replace(file)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        headers = [check_safetensors(file).values() for file in files]
        ends = (entry["data_offsets"] for header in headers for entry in header)
        content.setdefault("metadata", {})["total_size"] = sum(end - start for start, end in ends)
        write_atomically(index, json.dumps(content, indent=2) + "\n")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
