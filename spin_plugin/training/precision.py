"""The dtype of the trained weights, chosen so that small updates are not rounded away.

bf16 values near 0.02 are 1.2e-4 apart. AdamW at a learning rate of 5e-7 makes updates of 5e-7, which rounding
discards: after 20 such steps 0.1% of the weights have changed. So trained weights are kept in fp32 (the masters)
while compute stays in 16 bits: autocast in a single process and under DDP, FSDP2's mixed precision, DeepSpeed's own
masters. The saved model is in 16 bits again.

Optimizers that do not lose small updates (`WITHOUT_MASTERS`) can train 16-bit weights, which saves memory.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spin_plugin.config.specs import TrainingSpec
from spin_plugin.console import SpinError


class SyncRoundingNoise(TrainerCallback):
    """Seeds every optimizer step, so that DDP replicas round stochastically with the same noise."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed(args.seed + state.global_step)


HALF = (torch.bfloat16, torch.float16)
ROUNDS_STOCHASTICALLY = "bf16_stochastic_round"
# Optimizers whose updates of 16-bit weights are unbiased (torchao's stochastic rounding, if this argument is set) or
# nearly exact in the sum (optimi's compensated summation, always on, keeps what was lost in bf16).
WITHOUT_MASTERS: dict[str, str | None] = {
    "adamw_torch_8bit": ROUNDS_STOCHASTICALLY,
    "adamw_torch_4bit": ROUNDS_STOCHASTICALLY,
    "ao_adamw_fp8": ROUNDS_STOCHASTICALLY,
    "optimi_adamw": None,
}
WAYS_OUT = (
    "use `bf16: true` (fp32 masters); to save memory, also `optimizer: adamw_torch_8bit` with "
    f"`optim_args: {{{ROUNDS_STOCHASTICALLY}: true}}`"
)


# --- before vLLM starts --------------------------------------------------------------------------


def require_no_lost_updates(training: TrainingSpec) -> None:
    """Refuse to train 16-bit weights with an optimizer that rounds small updates away.

    Raises:
        SpinError: starts with the key.
    """
    if not training.in_16_bits:
        return
    if training.adapter:
        if training.adapter_in_model_dtype:
            raise SpinError(
                "peft_autocast_adapter_dtype: false keeps the adapter in 16 bits, where small updates are rounded "
                "away; remove the key"
            )
        return
    if training.deepspeed:
        if _deepspeed(training.deepspeed).get("bf16", {}).get("bf16_master_weights_and_grads"):
            raise SpinError(
                "deepspeed: bf16_master_weights_and_grads keeps the masters in 16 bits, where small updates are "
                "rounded away; remove it"
            )
        return
    if training.dtype == "float16":
        raise SpinError(
            f"{training.fp16_key}: a full fine-tune in fp16 rounds small updates away; {WAYS_OUT}, or `bf16: false` "
            "and `fp16: false` to train in fp32, or `adapter: lora`"
        )


def _deepspeed(config: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Read DeepSpeed's configuration, which Axolotl takes as a mapping or as a file name."""
    if isinstance(config, Mapping):
        return config
    try:
        content = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpinError(f"deepspeed: {config} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SpinError(f"deepspeed: {config} must contain a JSON object")
    return content


def zero_stage(training: TrainingSpec) -> int:
    """Return the stage of DeepSpeed ZeRO; 0 without DeepSpeed."""
    config = _deepspeed(training.deepspeed) if training.deepspeed else {}
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def offloads(training: TrainingSpec) -> bool:
    """Whether DeepSpeed keeps weights or optimizer state on the CPU or a disk."""
    zero = (_deepspeed(training.deepspeed) if training.deepspeed else {}).get("zero_optimization") or {}
    places = (zero.get(f"offload_{part}") or {} for part in ("param", "optimizer"))
    return any(place.get("device", "none") != "none" for place in places)


def needs_no_masters(training: TrainingSpec) -> bool:
    """Whether the optimizer trains 16-bit weights without losing small updates."""
    if training.optimizer not in WITHOUT_MASTERS:
        return False
    argument = WITHOUT_MASTERS[training.optimizer]
    return argument is None or str(training.optim_args.get(argument)).lower() == "true"


def keeps_masters(training: TrainingSpec) -> bool:
    """Whether a full fine-tune loads the model in 16 bits and trains fp32 masters."""
    return training.full_in_16_bits and not needs_no_masters(training)


# --- the model -----------------------------------------------------------------------------------


def keep_masters(training: TrainingSpec, model: nn.Module) -> None:
    """Convert the trained weights to fp32 in place, before anything wraps the model.

    DeepSpeed keeps its own masters, and `WITHOUT_MASTERS` optimizers need none. FSDP2 requires one dtype in all
    parameters that it shards together, so frozen weights become fp32 too, and an adapter keeps the dtype PEFT gave it.
    """
    # transformers leaves these weights empty until FSDP2 broadcasts the first rank's; untouched, they take no memory
    empty = training.empty_on_other_ranks and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if (
        training.deepspeed
        or (needs_no_masters(training) and not training.adapter)
        or (training.fsdp and training.adapter)
    ):
        return
    for parameter in model.parameters():
        if parameter.dtype in HALF and (parameter.requires_grad or training.fsdp):
            loaded = parameter.data
            parameter.data = torch.empty_like(loaded, dtype=torch.float32) if empty else loaded.float()


def keep_4bit_weights_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights for CPUs with AVX512-BF16 when they are used in evaluation mode.

    The packed form has no gradient, and bitsandbytes 0.50 keeps it when training begins: layers below would not learn.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_outputs_in_fp32(accelerator: Any) -> None:
    """Stop FSDP2 under accelerate from casting model outputs to bf16, which rounds log-probs of 500 to steps of 2."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def require_masters(training: TrainingSpec, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check the dtype of the weights that the optimizer holds, however the model was loaded and wrapped.

    Args:
        training: the training settings from the configuration.
        groups: the optimizer's `param_groups`; under DeepSpeed they hold its partitions.

    Raises:
        SpinError: the optimizer would round small updates away.
    """
    halves = sum(p.numel() for group in groups for p in group["params"] if p.dtype in HALF)
    if halves and not needs_no_masters(training):
        raise SpinError(f"{halves:,} weights would be trained in 16 bits, where small updates are lost; {WAYS_OUT}")
