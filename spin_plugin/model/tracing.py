"""Record how a model calls its attention and in which precision it computes, during a forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from spin_plugin.model.attention import NAME, attend, compute_dtype

OPTIONS = ("scaling", "sliding_window", "softcap")


class Call(NamedTuple):
    """A distinct signature with which a model calls its attention."""

    heads_and_sizes: tuple[tuple[int, int], ...]
    """Number of heads and head size of query, key and value."""
    dtype: torch.dtype
    scaling: float | None
    sliding_window: int | None
    softcap: float | None

    def run(self, spans: Tensor, tokens: int) -> None:
        """Run attention forward and backward on random states of a row with `tokens` tokens."""
        query, key, value = (
            torch.randn(1, heads, tokens, size, dtype=self.dtype, device=spans.device, requires_grad=True)
            for heads, size in self.heads_and_sizes
        )
        options: dict[str, Any] = {name: getattr(self, name) for name in OPTIONS}
        with torch.enable_grad():
            output, _ = attend(nn.Module(), query, key, value, None, spans=spans, **options)
            torch.autograd.grad(output.sum(), (query, key, value))


@contextmanager
def attention_calls() -> Iterator[set[Call]]:
    """Record the distinct calls to `attend` within the context, for a model on which `enable` was called."""
    calls: set[Call] = set()

    def recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes = tuple((states.shape[1], states.shape[3]) for states in (query, key, value))
        options = (kwargs.get(name) for name in OPTIONS)
        calls.add(Call(shapes, compute_dtype(query), *options))
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(NAME, recorded)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, attend)


@contextmanager
def linear_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Record the output dtypes of the linear layers within the context.

    They are only known during the forward, because autocast and FSDP choose the compute dtype there.
    """
    dtypes: set[torch.dtype] = set()

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # some routers subclass nn.Linear and return a tuple
            dtypes.add(output.dtype)

    hooks = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield dtypes
    finally:
        for hook in hooks:
            hook.remove()
