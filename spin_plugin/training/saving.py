"""What an iteration stores: checkpoints that last, and weights rounded to 16 bits."""

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


def mend_times(checkpoints: list[Path]) -> None:
    """Keep checkpoints, given in the order of their steps, in that order, and none in the future.

    transformers 5.16 removes the oldest ones by their times (`rotate_checkpoints(use_mtime=True)`).
    """
    times = [path.stat().st_mtime for path in checkpoints]
    if times and (max(times) > time.time() or times != sorted(times)):
        for path in checkpoints:
            step = int(path.name.rpartition("-")[2])
            os.utime(path, (step, step))


@contextmanager
def naming_the_disk(directory: str) -> Iterator[None]:
    """safetensors and torch report a full disk each in its own way; say it in ours."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not re.search(r"os error \d|PytorchStreamWriter|inline_container", str(error)):
            raise
        free = shutil.disk_usage(directory).free / 1e9
        raise SpinError(
            f"{directory} could not be written ({free:.1f} GB are free): {str(error)[:200]}; make room, then run the "
            "same command again: it goes on from the last complete checkpoint"
        ) from None


class RoundAtTheEnd(TrainerCallback):
    """Brings masters to bf16 before Axolotl saves the model, so that in the mean nothing of their movement is lost."""

    def __init__(self, kept: list[str]) -> None:
        self.kept = kept

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        round_masters(kwargs["model"], kept=self.kept, seed=args.seed, states=kwargs["optimizer"].state)


# What activation checkpointing and torch.compile add to the names of parameters.
WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\.")


# --- what an iteration stores ----------------------------------------------------------------------


def rounded_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 numbers as bf16 numbers, each one of its two neighbours, and the number itself in the mean.

    What an iteration has moved by less than half a step of bf16 would otherwise be where it was before: of 50 steps at
    5e-7 rounding to the nearest keeps 11%. The noise is that of any rounding to bf16.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.float().contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


@torch.no_grad()
def round_masters(
    model: nn.Module, *, kept: Iterable[str], seed: int, states: Mapping[nn.Parameter, Mapping[str, Any]]
) -> None:
    """Round the trained weights to bf16 numbers at the end of training, in place; every rank calls it.

    Args:
        model: the model itself, whatever is wrapped around it. Its parameters may be DeepSpeed's, whose masters lie
            with the optimizer, or FSDP2's shards.
        kept: names of parameters that the architecture wants in 32 bits.
        seed: of the rounding.
        states: the optimizer's, which may hold what compensated summation has kept of a bf16 weight.
    """
    kept = set(kept)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad or WRAPPERS.sub("", name) in kept:
            continue
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            _round_deepspeed(parameter, seed + number)
            continue
        weights, lost = _local(parameter), states.get(parameter, {}).get("kahan_comp")
        if weights.dtype == torch.float32 or lost is not None:
            master = weights.float() if lost is None else weights.float() + _local(lost).float()
            generator = _generator(weights, seed + number + _place(parameter))
            weights.copy_(rounded_stochastically(master, generator))


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(parameter: nn.Parameter) -> int:
    """Tells the shards of a parameter apart, whose noise has to differ; 0 where it is whole."""
    if not isinstance(parameter, DTensor):
        return 0
    place: Sequence[int] = parameter.device_mesh.get_coordinate() or []
    shard = [at for at, placement in zip(place, parameter.placements, strict=True) if placement.is_shard()]
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
    """Rewrite a model's safetensors, a file at a time and each in one step, with its 32-bit tensors in 16 bits.

    Args:
        directory: the model's directory.
        files: its safetensors files.
        dtype: bfloat16, or float16.
        kept: names of tensors that the architecture wants in 32 bits.
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
        for name in masters:  # one after the other: a file may hold 50 GB
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
