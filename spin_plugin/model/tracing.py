"""What can be seen of a model during its forward: how it calls its attention, and in which precision it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from spin_plugin.model.attention import NAME, attend, computes_in

ASKED = ("scaling", "sliding_window", "softcap")


class Call(NamedTuple):
    """A kind of call that a model makes to its attention."""

    heads_and_sizes: tuple[tuple[int, int], ...]
    """Of query, key and value."""
    dtype: torch.dtype
    scaling: float | None
    sliding_window: int | None
    softcap: float | None

    def run(self, spans: Tensor, tokens: int) -> None:
        """Attend in a row of so many tokens, forward and backward, to anything."""
        query, key, value = (
            torch.randn(1, heads, tokens, size, dtype=self.dtype, device=spans.device, requires_grad=True)
            for heads, size in self.heads_and_sizes
        )
        asked: dict[str, Any] = {name: getattr(self, name) for name in ASKED}
        with torch.enable_grad():
            output, _ = attend(nn.Module(), query, key, value, None, spans=spans, **asked)
            torch.autograd.grad(output.sum(), (query, key, value))


@contextmanager
def attention_calls() -> Iterator[set[Call]]:
    """The kinds of calls that are made meanwhile to the attention that `enable` has chosen."""
    calls: set[Call] = set()

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes = tuple((states.shape[1], states.shape[3]) for states in (query, key, value))
        asked = (kwargs.get(name) for name in ASKED)
        calls.add(Call(shapes, computes_in(query), *asked))
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(NAME, watched)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, attend)


@contextmanager
def linear_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """What the linear layers compute in meanwhile: autocast and FSDP choose that inside of the forward."""
    dtypes: set[torch.dtype] = set()

    def watch(_part: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # some routers, linear layers too, give more
            dtypes.add(output.dtype)

    hooks = [part.register_forward_hook(watch) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        yield dtypes
    finally:
        for hook in hooks:
            hook.remove()
