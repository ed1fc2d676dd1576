"""How fp32 masters begin and end as bf16 weights, so that the loss sees every movement and the saved model has it.

The forward rounds the masters to bf16, to nearest. Masters that start as bf16 numbers lie in the middle of the values
that round to them, so nothing that moves by less than half a bf16 step, about 1e-4 for a weight of 0.05, reaches the
loss. At SPIN's learning rates that is most of an iteration: training pushes on blindly, and all weights jump later.

So masters start at a random place among the values that round to the weight (dither). Before the first step the forward
computes with the same bf16 weights as without; then a movement of a tenth of a bf16 step changes a tenth of the weights
by a whole one: its mean is exact. Rounded to nearest, they are saved as training saw them.

Autocast leaves embedding tables and vectors such as the norms' in fp32; they are not dithered, and saved with
stochastic rounding. A table tied to the head is dithered for the head, so its look-ups carry noise of bf16's size.
Adapters are dithered once and saved as they are; vLLM rounds them as the forward did.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Prefixes that activation checkpointing, torch.compile and FSDP add to parameter names.
WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\.")
SEEDS_PER_ITERATION = 1 << 24  # more than a model has tensors
SEEDS_PER_SHARD = 1_000_003
PART = 1 << 24  # weights changed at a time; an embedding table and its noise would take gigabytes


class RoundMasters(TrainerCallback):
    """Dithers masters before the first step and rounds them before Axolotl saves the model.

    It must come before every callback that scores the model at the same events.
    """

    def __init__(self, kept: list[str], *, everywhere: bool, iteration: int, adapter: bool) -> None:
        """
        Args:
            kept: names of parameters that the architecture keeps in fp32.
            everywhere: whether the forward casts every weight to bf16 (FSDP, DeepSpeed), not only those of matrix
                products (autocast).
            iteration: each has its own noise; otherwise the same weights would be rounded up every time.
            adapter: an adapter is trained, which is not rounded at the end.
        """
        self.kept, self.everywhere, self.iteration, self.adapter = kept, everywhere, iteration, adapter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:  # the masters of a checkpoint are dithered
            dither_masters(kwargs["model"], kept=self.kept, seed=self._seed(args), everywhere=self.everywhere)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:  # the first step, which creates the residuals
            dither_residuals(kwargs["model"], kwargs["optimizer"].state, seed=self._seed(args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.adapter:
            round_masters(kwargs["model"], kept=self.kept, seed=self._seed(args), everywhere=self.everywhere)

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed + self.iteration * SEEDS_PER_ITERATION


# --- one tensor ------------------------------------------------------------------------------------


def dithered(values: Tensor, generator: torch.Generator) -> Tensor:
    """Move bf16 numbers, given in fp32, to a random place among the fp32 values that round to them.

    Rounding adds half a step and drops the lower 16 bits; the noise stays below that half. Zeros stay zero, and values
    between bf16 numbers where they are: those of an adapter that was dithered in an earlier iteration.
    """
    half = 1 << 15
    noise = torch.randint(1 - half, half, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.contiguous().view(torch.int32)
    moves = (bits & (2 * half - 1) == 0) & values.isfinite() & (values.abs() >= torch.finfo(torch.float32).tiny)
    return torch.where(moves, (bits + noise).view(torch.float32), values)


def rounded_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 values to bf16, each up or down at random so that its mean is exact.

    For masters that were not dithered: rounding to nearest would undo every movement below half a bf16 step. The error
    of each value stays below one bf16 step.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.float().contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


# --- a model ---------------------------------------------------------------------------------------


@torch.no_grad()
def dither_masters(model: nn.Module, *, kept: Iterable[str], seed: int, everywhere: bool) -> None:
    """Dither the masters of all weights that the forward rounds; every rank must call it.

    Args:
        model: the unwrapped model. Its parameters can be DeepSpeed's, whose masters are in the optimizer, or FSDP2's
            shards.
        kept: names of parameters that the architecture keeps in fp32.
        seed: seed of the noise.
        everywhere: whether the forward casts every weight to bf16.
    """
    for number, parameter in _rounded_by_the_forward(model, kept, everywhere):
        if _is_deepspeeds(parameter):
            _dither_deepspeed(parameter, seed + number)
            continue
        weights = _local(parameter)
        if weights.dtype == torch.float32:
            _dither(weights, _generator(weights, parameter, seed + number))


@torch.no_grad()
def dither_residuals(model: nn.Module, states: Mapping[nn.Parameter, Mapping[str, Any]], *, seed: int) -> None:
    """Dither bf16 matrices whose optimizer keeps the residual of each weight (compensated summation, `kahan_comp`).

    A residual is a bf16 number itself: noise of half a step leaves it 2^-9 of that step as its own. Vectors, whose
    weights are near 1, would lose all small updates to it.

    Args:
        model: the unwrapped model.
        states: the optimizer's state after its first step.
        seed: seed of the noise.
    """
    for number, parameter in enumerate(model.parameters()):
        residual = states.get(parameter, {}).get("kahan_comp")
        if residual is None or parameter.dtype != torch.bfloat16 or parameter.dim() < 2:
            continue
        weights = _local(parameter)
        generator = _generator(weights, parameter, seed + number)
        for part, lost in zip(_parts(weights), _parts(_local(residual)), strict=True):
            lost.add_(dithered(part.float(), generator) - part.float())


@torch.no_grad()
def round_masters(model: nn.Module, *, kept: Iterable[str], seed: int, everywhere: bool) -> None:
    """Round the masters to bf16 values in place at the end of training; every rank must call it.

    Dithered masters are rounded to nearest, as in the forward, others stochastically. Nothing is left to do for bf16
    weights, DeepSpeed's among them.

    Args:
        model: see `dither_masters`.
        kept: names of parameters that the architecture keeps in fp32.
        seed: seed of the rounding noise.
        everywhere: whether the forward casts every weight to bf16.
    """
    nearest = {number for number, _ in _rounded_by_the_forward(model, kept, everywhere)}
    for number, parameter in _trained(model, kept):
        weights = _local(parameter)
        if _is_deepspeeds(parameter) or weights.dtype != torch.float32:
            continue
        generator = _generator(weights, parameter, seed + number)
        for part in _parts(weights):
            part.copy_(part.bfloat16() if number in nearest else rounded_stochastically(part, generator))


def _trained(model: nn.Module, kept: Iterable[str]) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield each trained parameter that is saved in 16 bits, and its number in the model."""
    kept = set(kept)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad and WRAPPERS.sub("", name) not in kept:
            yield number, parameter


def _rounded_by_the_forward(
    model: nn.Module, kept: Iterable[str], everywhere: bool
) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield the parameters of `_trained` that the forward uses in bf16.

    Autocast leaves embedding tables, unless tied to the head, and vectors such as the norms' in fp32.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for number, parameter in _trained(model, kept):
        if everywhere or (parameter.dim() > 1 and id(parameter) not in tables - tied):
            yield number, parameter


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_seed(parameter: nn.Parameter) -> int:
    """Return a seed offset that differs between a parameter's shards; 0 if it is not sharded."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        return SEEDS_PER_SHARD * torch.distributed.get_rank()
    if not isinstance(parameter, DTensor):
        return 0
    coordinate: Sequence[int] = parameter.device_mesh.get_coordinate() or []
    shard = [at for at, placement in zip(coordinate, parameter.placements, strict=True) if placement.is_shard()]
    return SEEDS_PER_SHARD * sum(at * 1009**number for number, at in enumerate(shard))


def _parts(weights: Tensor) -> Sequence[Tensor]:
    return weights.view(-1).split(PART) if weights.is_contiguous() else (weights,)


def _dither(masters: Tensor, generator: torch.Generator) -> None:
    for part in _parts(masters):
        part.copy_(dithered(part, generator))


def _is_deepspeeds(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _dither_deepspeed(parameter: nn.Parameter, seed: int) -> None:
    """Dither DeepSpeed's master: this rank's part under ZeRO-3, otherwise all, with equal noise on every rank."""
    from deepspeed import utils

    if parameter.dtype != torch.bfloat16:
        return
    if hasattr(parameter, "ds_id"):
        # a getter and setter of whole parameters exist, but the setter fails unless the ranks' parts are equal
        get, put = utils.safe_get_local_fp32_param, utils.safe_set_local_fp32_param
    else:
        get, put = utils.safe_get_full_fp32_param, utils.safe_set_full_fp32_param
    master = get(parameter)
    if master is not None:
        _dither(master, _generator(master, parameter, seed))
        put(parameter, master)


def _generator(weights: Tensor, parameter: nn.Parameter, seed: int) -> torch.Generator:
    """Return the generator for this rank's weights of a parameter, on their device: a master can be offloaded."""
    return torch.Generator(weights.device).manual_seed(seed + _shard_seed(parameter))
