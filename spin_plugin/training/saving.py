"""What an iteration saves: checkpoints, and weights rounded to 16 bits."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


class RoundMastersAtEnd(TrainerCallback):
    """Rounds masters to bf16 before Axolotl saves the model, stochastically so that no movement is lost on average."""

    def __init__(self, kept: list[str]) -> None:
        self.kept = kept

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        round_masters(kwargs["model"], kept=self.kept, seed=args.seed, states=kwargs["optimizer"].state)


# Prefixes that activation checkpointing, torch.compile and FSDP add to parameter names.
WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\.")


# --- rounding --------------------------------------------------------------------------------------


def rounded_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 values to bf16, each up or down at random so that its mean is exact.

    Rounding to nearest would undo every movement below half a bf16 step: of 50 steps at 5e-7 it keeps 11%. The error
    of each value stays below one bf16 step.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.float().contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


@torch.no_grad()
def round_masters(
    model: nn.Module, *, kept: Iterable[str], seed: int, states: Mapping[nn.Parameter, Mapping[str, Any]]
) -> None:
    """Round the trained weights to bf16 values in place at the end of training; every rank must call it.

    Args:
        model: the unwrapped model. Its parameters can be DeepSpeed's, whose masters are in the optimizer, or FSDP2's
            shards.
        kept: names of parameters that the architecture keeps in fp32.
        seed: seed of the rounding noise.
        states: the optimizer's state, which can hold the residual that compensated summation keeps of a bf16 weight.
    """
    kept = set(kept)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad or WRAPPERS.sub("", name) in kept:
            continue
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            _round_deepspeed(parameter, seed + number)
            continue
        weights, residual = _local(parameter), states.get(parameter, {}).get("kahan_comp")
        if weights.dtype == torch.float32 or residual is not None:
            master = weights.float() if residual is None else weights.float() + _local(residual).float()
            generator = _generator(weights, seed + number + _shard_seed(parameter))
            weights.copy_(rounded_stochastically(master, generator))


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_seed(parameter: nn.Parameter) -> int:
    """Return a seed offset that differs between a parameter's shards; 0 if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0
    coordinate: Sequence[int] = parameter.device_mesh.get_coordinate() or []
    shard = [at for at, placement in zip(coordinate, parameter.placements, strict=True) if placement.is_shard()]
    return 1_000_003 * sum(at * 1009**number for number, at in enumerate(shard))


def _round_deepspeed(parameter: nn.Parameter, seed: int) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    with GatheredParameters([parameter], modifier_rank=0):
        if master is not None and parameter.dtype == torch.bfloat16:
            parameter.copy_(rounded_stochastically(master, _generator(master, seed)))


def _generator(tensor: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(tensor.device).manual_seed(seed)


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
