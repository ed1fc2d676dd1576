"""Log-probabilities of the responses, with the LM head applied only where a response token is predicted.

`install` gives a causal LM's forward one more keyword, `spin_batch`. With it, the forward runs the
decoder, takes the K hidden states that predict a response token, and applies the LM head to `CHUNK` of
them at a time, so that memory does not grow with vocabulary x tokens. Because this happens inside the
model's own forward, whatever wraps the model (DDP, FSDP, DeepSpeed, autocast) works as ever; without the
keyword nothing changes. `logps` is the call; `spin_plugin.model.select` finds out whose head we do not understand,
so that such a model falls back to its own logits.
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
"""Positions whose logits are worked on at one time."""
KEPT = 2**29
"""Bytes of logits that are kept for backward; what is beyond them is computed again."""


class LogitMap(NamedTuple):
    """What a model does to the output of its LM head: a scale, then soft-capping."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "LogitMap":
        """Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma 2 and later cap."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative, given the result."""
        return self.scale if self.cap is None else self.scale * (1 - (logits.float() / self.cap) ** 2)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[C, V] of states [C, H], weight [V, H], bias [V] or None: fp32 where these are of 16 bits.

    Rounded to 16 bits, a logit is off by up to 0.06 at 20, differently in each shape of batch; a response sums up
    hundreds of them. Products of 16-bit numbers are exact in fp32, so this rounds the sums alone.
    """
    if states.dtype.itemsize > 2:
        return linear(states, weight, bias)
    if states.is_cuda:
        logits = torch.mm(states, weight.mT, out_dtype=torch.float32)
    else:  # torch 2.13 has no such product here
        logits = states.float() @ weight.float().mT
    return logits if bias is None else logits + bias


class _LinearLogps(torch.autograd.Function):
    """log softmax(map(h W^T + b)) at the target, chunk by chunk in both directions.

    The first chunks' logits are kept for backward, up to a fixed number of bytes; the others are computed
    again there, which costs a third more of the head's work on them, and memory that does not grow.
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
        """[K] fp32 of hidden [K, H], weight [V, H], bias [V] or None, targets [K]."""
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
        """With g the gradient [K]: dz = -g (softmax - one-hot), folded into the [K, H] side of each product."""
        hidden, weight, bias, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            force = -gradient[rows, None]
            raw = ctx.kept.pop(first) if first in ctx.kept else _logits(hidden[rows], weight, bias)
            pull = _pull(raw, targets[rows, None], ctx.logit_map)
            if d_bias is not None:
                d_bias += (pull.T @ force)[:, 0]
            pull = pull.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (pull @ weight) * force
            if d_weight is not None:
                d_weight.addmm_(pull.T, (hidden[rows] * force).to(weight.dtype))
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _pull(raw: Tensor, targets: Tensor, logit_map: LogitMap) -> Tensor:
    """[C, V] fp32, minus the derivative of the target's log-probability by the head's output [C, V]."""
    logits = logit_map(raw)
    pull = logits.softmax(-1, dtype=torch.float32)
    pull.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=torch.float32))
    return pull if logit_map == LogitMap() else pull.mul_(logit_map.slope(logits))


class _Predicted(NamedTuple):
    """What the LM head is asked for instead of logits. A module's call, so that its hooks bring its weights."""

    targets: Tensor
    logit_map: LogitMap


def linear_forward(self: nn.Linear, states: Tensor, predicted: _Predicted | None = None) -> Tensor:
    """`nn.Linear.forward`, or the [K] log-probabilities of `predicted`."""
    if predicted is None:
        return linear(states, self.weight, self.bias)
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
    kept_bytes = KEPT if torch.is_grad_enabled() else 0
    with torch.autocast(kind, enabled=False):
        return _LinearLogps.apply(states.to(dtype), weight, bias, *predicted, kept_bytes)


def _is_sharded(head: nn.Module) -> bool:
    """Are the head's weights gathered when it is called (ZeRO-3, FSDP)? All ranks must call it equally often."""
    partitioned = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    return partitioned or any(type(part).__name__.startswith(("FSDP", "FullySharded")) for part in head.modules())


@torch.compiler.disable  # its loop over the chunks would be compiled anew for each number of them
def head_logps(head: nn.Module, hidden: Tensor, batch: dict[str, Tensor], logit_map: LogitMap) -> Tensor:
    """[R] log-probabilities of the R responses from the K hidden states [K, H] that predict them."""
    targets, segments, responses = batch["targets"], batch["segments"], batch["lengths"].numel()
    if getattr(head.__dict__.get("forward"), "__func__", None) is linear_forward:
        chosen = head(hidden, predicted=_Predicted(targets, logit_map))
        return torch.zeros(responses, device=chosen.device).index_add(0, segments, chosen)

    # LoRA on the head, quantised heads: autograd must see the module, so each chunk is a checkpoint
    def chunk_logps(states: Tensor, tokens: Tensor, owners: Tensor) -> Tensor:
        return response_logps(logit_map(head(states)), tokens, owners, responses)

    run: Callable[..., Tensor] = chunk_logps
    if torch.is_grad_enabled():
        run = lambda *chunk: checkpoint(chunk_logps, *chunk, use_reentrant=False)  # noqa: E731
    size = len(hidden) if _is_sharded(head) else CHUNK
    chunks = zip(hidden.split(size), targets.split(size), segments.split(size), strict=True)
    return torch.stack([run(*chunk) for chunk in chunks]).sum(0)
