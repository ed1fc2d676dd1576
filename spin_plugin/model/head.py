"""The LM head, applied only to the K hidden states that predict a response token, in chunks.

Memory does not grow with vocabulary x tokens. torch's `linear_cross_entropy` does the same from 2.13 on, but it rounds
log-probs to the weights' 16 bits (an error of 0.03 per token), has no soft-capping, and always computes the logits
again in backward (`scripts/bench/head.py`).

`forward.install` puts this inside the model's own forward, so that DDP, FSDP, DeepSpeed and autocast see an ordinary
call; `select` finds models whose head differs, which then use their own logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from spin_plugin.model.logprobs import response_logps

CHUNK = 1024
"""Rows of logits in memory at a time."""
KEPT = 2**29
"""Bytes of logits kept for backward; the rest is recomputed."""


class LogitMap(NamedTuple):
    """What a model applies to the output of its LM head: a scale, then soft-capping."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "LogitMap":
        """Read a model's map: Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma 2 caps."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the map, given its result `logits`."""
        return self.scale if self.cap is None else self.scale * (1 - (logits.float() / self.cap) ** 2)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [C, V] of states [C, H], weight [V, H] and bias [V] or None; in fp32 for 16-bit inputs.

    A logit near 20 rounded to 16 bits is off by up to 0.06, and a response sums hundreds of them. Products of 16-bit
    numbers are exact in fp32, so only the sums are rounded here.
    """
    if states.dtype.itemsize > 2:
        return linear(states, weight, bias)
    if states.is_cuda:
        logits = torch.mm(states, weight.mT, out_dtype=torch.float32)
    else:  # torch 2.13 has `out_dtype` on CUDA only
        logits = states.float() @ weight.float().mT
    return logits if bias is None else logits + bias


class _LinearLogps(torch.autograd.Function):
    """log softmax(map(h W^T + b)) at the target, chunk by chunk in forward and backward.

    The logits of the first chunks are kept for backward, up to a fixed number of bytes. Those of the others are
    recomputed there: a third more work, for memory that does not grow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_map: LogitMap,
        kept_bytes: int,
    ) -> Tensor:
        """Log-probs [K] in fp32 from hidden [K, H], weight [V, H], bias [V] or None, and targets [K]."""
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.logit_map, ctx.kept = logit_map, {}
        chosen = []
        for number, (states, tokens) in enumerate(zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)):
            raw = _logits(states, weight, bias)
            kept_bytes -= raw.nbytes
            if kept_bytes >= 0:
                ctx.kept[number * CHUNK] = raw
            log_softmax = logit_map(raw).log_softmax(-1, dtype=torch.float32)
            chosen.append(log_softmax.gather(-1, tokens[:, None])[:, 0])
        return torch.cat(chosen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """With g the gradient [K], dz = -g (softmax - one-hot); g is folded into the [K, H] side of each product."""
        hidden, weight, bias, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needed[0] else None
        d_weight = torch.zeros_like(weight) if needed[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] else None
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            minus_g = -gradient[rows, None]
            raw = ctx.kept.pop(first) if first in ctx.kept else _logits(hidden[rows], weight, bias)
            dz = _softmax_minus_one_hot(raw, targets[rows, None], ctx.logit_map)
            if d_bias is not None:
                d_bias += (dz.T @ minus_g)[:, 0]
            dz = dz.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (dz @ weight) * minus_g
            if d_weight is not None:
                d_weight.addmm_(dz.T, (hidden[rows] * minus_g).to(weight.dtype))
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _softmax_minus_one_hot(raw: Tensor, targets: Tensor, logit_map: LogitMap) -> Tensor:
    """Minus the derivative of the target's log-prob by the head's raw output [C, V]; [C, V] in fp32."""
    logits = logit_map(raw)
    dz = logits.softmax(-1, dtype=torch.float32)
    dz.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=torch.float32))
    return dz if logit_map == LogitMap() else dz.mul_(logit_map.slope(logits))


class _Predicted(NamedTuple):
    """Asks the LM head for log-probs instead of logits, in a call so that FSDP's hooks gather its weights."""

    targets: Tensor
    logit_map: LogitMap


def linear_forward(self: nn.Linear, states: Tensor, predicted: _Predicted | None = None) -> Tensor:
    """`nn.Linear.forward`, or with `predicted` the log-probs [K] of its targets."""
    if predicted is None:
        return linear(states, self.weight, self.bias)
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
    kept_bytes = KEPT if torch.is_grad_enabled() else 0
    with torch.autocast(kind, enabled=False):
        return _LinearLogps.apply(states.to(dtype), weight, bias, *predicted, kept_bytes)


def _is_sharded(head: nn.Module) -> bool:
    """Whether a call gathers the head's weights (ZeRO-3, FSDP), so that all ranks must call it equally often."""
    partitioned = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    return partitioned or any(type(part).__name__.startswith(("FSDP", "FullySharded")) for part in head.modules())


@torch.compiler.disable  # it would recompile for every number of chunks
def head_logps(head: nn.Module, hidden: Tensor, batch: dict[str, Tensor], logit_map: LogitMap) -> Tensor:
    """Log-probs [R] of the responses from the K hidden states [K, H] that predict their tokens."""
    targets, segments, responses = batch["targets"], batch["segments"], batch["lengths"].numel()
    if getattr(head.__dict__.get("forward"), "__func__", None) is linear_forward:
        chosen = head(hidden, predicted=_Predicted(targets, logit_map))
        return torch.zeros(responses, device=chosen.device).index_add(0, segments, chosen)

    # LoRA on the head and quantized heads need autograd through the module, so each chunk is checkpointed
    def chunk_logps(states: Tensor, tokens: Tensor, owners: Tensor) -> Tensor:
        return response_logps(logit_map(head(states)), tokens, owners, responses)

    run: Callable[..., Tensor] = chunk_logps
    if torch.is_grad_enabled():
        run = lambda *chunk: checkpoint(chunk_logps, *chunk, use_reentrant=False)  # noqa: E731
    size = len(hidden) if _is_sharded(head) else CHUNK
    chunks = zip(hidden.split(size), targets.split(size), segments.split(size), strict=True)
    return torch.stack([run(*chunk) for chunk in chunks]).sum(0)
