"""The precision of the trained weights: an optimizer's step must move them.

A bf16 number of size 0.02 is stored in steps of 1.2e-4. AdamW at a learning rate of 5e-7 asks for moves of 5e-7, which
rounding takes back: after 20 such steps 0.1% of the weights have changed, and the run has trained next to nothing. So
the weights that are trained are kept in 32 bits (the masters) while the arithmetic stays in 16 bits: autocast in one
process and under DDP, FSDP2's mixed precision, DeepSpeed's own masters. What an iteration stores is in 16 bits again.

Optimizers that do not lose small updates (`LEAN`) may work on 16-bit weights, for less memory.
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


class SameNoise(TrainerCallback):
    """The copies of a model under DDP draw the same noise of stochastic rounding, whatever else a rank has drawn."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed(args.seed + state.global_step)


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


# --- before vLLM starts --------------------------------------------------------------------------


def require_moving_weights(training: TrainingSpec) -> None:
    """Refuse what would train 16-bit weights with an optimizer that rounds its updates away.

    Raises:
        SpinError: names the key.
    """
    if not training.in_16_bits:
        return
    if training.adapter:
        if training.adapter_in_model_dtype:
            raise SpinError(
                "peft_autocast_adapter_dtype: false keeps the adapter in 16 bits, where rounding takes small updates "
                "back; remove the key"
            )
        return
    if training.deepspeed:
        if _deepspeed(training.deepspeed).get("bf16", {}).get("bf16_master_weights_and_grads"):
            raise SpinError(
                "deepspeed: bf16_master_weights_and_grads keeps the master weights in 16 bits, where rounding takes "
                "small updates back; remove it"
            )
        return
    if training.dtype == "float16":
        raise SpinError(
            f"{training.fp16_key}: a full fine-tune in fp16 rounds small updates away; {WAYS_OUT}, or `bf16: false` "
            "and `fp16: false` to train in 32 bits, or `adapter: lora`"
        )


def _deepspeed(config: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's configuration, which Axolotl takes as a mapping or as a file."""
    if isinstance(config, Mapping):
        return config
    try:
        content = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpinError(f"deepspeed: {config} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SpinError(f"deepspeed: {config} does not hold a mapping")
    return content


def is_lean(training: TrainingSpec) -> bool:
    """Whether the optimizer may work on 16-bit weights, because it does not lose small updates."""
    if training.optimizer not in LEAN:
        return False
    argument = LEAN[training.optimizer]
    return argument is None or str(training.optim_args.get(argument)).lower() == "true"


def keeps_masters(training: TrainingSpec) -> bool:
    """Whether 32-bit weights are trained of a model that is loaded in 16 bits."""
    return training.full_in_16_bits and not is_lean(training)


# --- the model -----------------------------------------------------------------------------------


def keep_masters(training: TrainingSpec, model: nn.Module) -> None:
    """Bring the trained weights to 32 bits, in place, before anything wraps the model.

    DeepSpeed keeps master weights itself, and LEAN optimizers need none. FSDP2 wants one format in all parameters that
    it shards together, so it gets the frozen ones in 32 bits too, and an adapter as PEFT made it.
    """
    # transformers leaves these empty: FSDP2 sends them the first process's weights, and until then they take no memory
    empty = training.empty_on_other_ranks and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if training.deepspeed or (is_lean(training) and not training.adapter) or (training.fsdp and training.adapter):
        return
    for parameter in model.parameters():
        if parameter.dtype in HALF and (parameter.requires_grad or training.fsdp):
            loaded = parameter.data
            parameter.data = torch.empty_like(loaded, dtype=torch.float32) if empty else loaded.float()


def keep_results_in_32_bits(accelerator: Any) -> None:
    """FSDP2 under accelerate brings what a model gives to bf16: log-probabilities of 500 to steps of 2."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def require_masters(training: TrainingSpec, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check the weights that the optimizer will change: the last guard, however they came about.

    Args:
        training: the run as it was read from the configuration.
        groups: the optimizer's `param_groups`, DeepSpeed's partitions among them.

    Raises:
        SpinError: it would round its updates away.
    """
    halves = sum(p.numel() for group in groups for p in group["params"] if p.dtype in HALF)
    if halves and not is_lean(training):
        raise SpinError(f"{halves:,} weights would be trained in 16 bits, where small updates are lost; {WAYS_OUT}")
