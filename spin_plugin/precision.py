"""The precision of the trained weights: an optimizer's step must move them.

A bf16 number of size 0.02 is stored in steps of 1.2e-4. AdamW at a learning rate of 5e-7 asks for moves of 5e-7, which
rounding takes back: after 20 such steps 0.1% of the weights have changed, and the run has trained next to nothing. So
the weights that are trained are kept in 32 bits (the masters) while the arithmetic stays in 16 bits: autocast in one
process and under DDP, FSDP2's mixed precision, DeepSpeed's own masters. What an iteration stores is in 16 bits again.

Optimizers that do not lose small updates (`LEAN`) may work on 16-bit weights, for less memory.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from spin_plugin.checkpoint import check_safetensors
from spin_plugin.messages import SpinError
from spin_plugin.run import write_whole

HALF = (torch.bfloat16, torch.float16)
ROUNDS_STOCHASTICALLY = "bf16_stochastic_round"
# Optimizers whose updates of 16-bit weights are right in the mean (torchao's stochastic rounding, an argument of
# theirs) or in the sum (optimi's compensated summation, on by itself).
LEAN: dict[str, str | None] = {
    "adamw_torch_8bit": ROUNDS_STOCHASTICALLY,
    "adamw_torch_4bit": ROUNDS_STOCHASTICALLY,
    "ao_adamw_fp8": ROUNDS_STOCHASTICALLY,
    "optimi_adamw": None,
}
WAYS_OUT = (
    "use `bf16: true` (32-bit masters), or for less memory also `optimizer: adamw_torch_8bit` with "
    f"`optim_args: {{{ROUNDS_STOCHASTICALLY}: true}}`"
)


# What activation checkpointing and torch.compile add to the names of parameters.
WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\.")


# --- before vLLM starts --------------------------------------------------------------------------


def require_moving_weights(cfg: Any) -> None:
    """Refuse what would train 16-bit weights with an optimizer that rounds its updates away.

    Args:
        cfg: Axolotl's validated configuration.

    Raises:
        SpinError: names the key.
    """
    if cfg.torch_dtype not in HALF:
        return
    if cfg.adapter:
        if cfg.peft_autocast_adapter_dtype is False:
            raise SpinError(
                "peft_autocast_adapter_dtype: false keeps the adapter in 16 bits, where rounding takes small updates "
                "back; remove the key"
            )
        return
    if cfg.deepspeed:
        if _deepspeed(cfg.deepspeed).get("bf16", {}).get("bf16_master_weights_and_grads"):
            raise SpinError(
                "deepspeed: bf16_master_weights_and_grads keeps the masters in 16 bits, where rounding takes small "
                "updates back; remove it"
            )
        return
    if cfg.torch_dtype == torch.float16:
        key = "float16" if cfg.float16 else "fp16"
        raise SpinError(
            f"{key}: a full fine-tune in fp16 rounds small updates away; {WAYS_OUT}, or `bf16: false` and `fp16: "
            "false` to train in 32 bits, or `adapter: lora`"
        )


def _deepspeed(config: Any) -> Mapping[str, Any]:
    """DeepSpeed's configuration, which Axolotl takes as a mapping or as a file."""
    if isinstance(config, Mapping):
        return config
    try:
        content = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpinError(f"deepspeed: {config} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SpinError(f"deepspeed: {config} holds no mapping")
    return content


def is_lean(cfg: Any) -> bool:
    """Whether the optimizer may work on 16-bit weights, since it does not lose small updates."""
    optimizer = str(getattr(cfg.optimizer, "value", cfg.optimizer))
    if optimizer not in LEAN:
        return False
    argument = LEAN[optimizer]
    return argument is None or str(_optim_args(cfg.optim_args).get(argument)).lower() == "true"


def _optim_args(args: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """`optim_args`, a mapping or `name=value,…`."""
    if isinstance(args, str):
        return dict(item.partition("=")[::2] for item in args.replace(" ", "").split(","))
    return args or {}


# --- the model -----------------------------------------------------------------------------------


def keep_masters(cfg: Any, model: nn.Module) -> None:
    """Bring the trained weights to 32 bits, in place, before anything wraps the model.

    DeepSpeed keeps masters itself, LEAN optimizers need none. FSDP2 wants one format in all parameters it shards
    together, so with it the frozen ones are brought along, and an adapter stays as PEFT made it.
    """
    sharded = cfg.fsdp_config or {}
    # transformers has left these empty: the first process's are sent to them, and until then they take no memory
    empty = sharded.get("cpu_ram_efficient_loading") and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if cfg.deepspeed or (is_lean(cfg) and not cfg.adapter) or (cfg.fsdp_config and cfg.adapter):
        return
    for parameter in model.parameters():
        if parameter.dtype in HALF and (parameter.requires_grad or cfg.fsdp_config):
            whole = parameter.data
            parameter.data = torch.empty_like(whole, dtype=torch.float32) if empty else whole.float()


def keep_results_in_32_bits(accelerator: Any) -> None:
    """FSDP2 under accelerate brings what a model gives to bf16: log-probabilities of 500 to steps of 2."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def require_masters(cfg: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Look at what the optimizer will change: the last guard, whatever the way there.

    Args:
        cfg: Axolotl's configuration.
        groups: the optimizer's `param_groups`, DeepSpeed's partitions among them.

    Raises:
        SpinError: it would round its updates away.
    """
    halves = sum(p.numel() for group in groups for p in group["params"] if p.dtype in HALF)
    if halves and not is_lean(cfg):
        raise SpinError(f"{halves:,} weights would be trained in 16 bits, where small updates are lost; {WAYS_OUT}")


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


def store_in_16_bits(folder: Path, files: Iterable[Path], dtype: torch.dtype, kept: Iterable[str]) -> None:
    """Rewrite a model's safetensors, a file at a time and each in one step, with its 32-bit tensors in 16 bits.

    Args:
        folder: the model's directory.
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
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        headers = [check_safetensors(file).values() for file in files]
        ends = (entry["data_offsets"] for header in headers for entry in header)
        content.setdefault("metadata", {})["total_size"] = sum(end - start for start, end in ends)
        write_whole(index, json.dumps(content, indent=2) + "\n")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
