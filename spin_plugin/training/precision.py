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
