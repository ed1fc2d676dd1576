"""A model forward that returns the log-probs of responses instead of logits."""

import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn

from spin_plugin.model.attention import shared_prefix_inputs
from spin_plugin.model.head import LogitMap, head_logps, linear_forward
from spin_plugin.model.logprobs import response_logps
from spin_plugin.model.support import causal_lm


def install(model: nn.Module) -> None:
    """Make the causal LM inside `model` accept the keyword `spin_batch`.

    Call it before the model is wrapped for training; repeated calls do nothing.
    """
    inner = causal_lm(model)
    if hasattr(inner, "spin_original_forward"):
        return
    head = inner.get_output_embeddings()
    inner.spin_original_forward = inner.__dict__.get("forward")

    # `wraps` because transformers' Trainer, among others, inspects the signature of `forward`.
    @wraps(type(inner).forward)
    def forward(self: Any, *args: Any, spin_batch: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        return _forward(self, spin_batch, *args, **kwargs)

    # Bound methods without a closure over the instance, so that a deep copy of the model uses its own weights.
    inner.forward = MethodType(forward, inner)
    if getattr(type(head), "forward", None) is nn.Linear.forward and "forward" not in head.__dict__:
        head.forward = MethodType(linear_forward, head)


def _forward(self: Any, batch: dict[str, Tensor] | None, *args: Any, own_logits: bool = False, **kwargs: Any) -> Any:
    original = self.spin_original_forward or MethodType(type(self).forward, self)
    if batch is None:
        return original(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes many as None
    if isinstance(kwargs.get("spans"), Tensor):
        kwargs |= shared_prefix_inputs(kwargs["spans"], kwargs["input_ids"].shape[1])
    if own_logits:
        return _own_logps(original, batch, kwargs)
    hidden = self.get_decoder()(**kwargs)[0].flatten(0, 1)[batch["keep"]]
    logit_map = LogitMap.of(self.config.get_text_config())
    return head_logps(self.get_output_embeddings(), hidden, batch, logit_map)


def _own_logps(original: Callable[..., Any], batch: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
    """Compute [R] log-probs from the model's own logits, only at the kept positions if the model supports it."""
    parameters = inspect.signature(original).parameters
    if "output_router_logits" in parameters:
        # They serve an auxiliary loss that SPIN lacks, and need a real mask, which a shared-prefix row lacks.
        inputs = inputs | {"output_router_logits": False}
    if len(inputs["input_ids"]) == 1 and "logits_to_keep" in parameters:
        logits = original(**inputs, logits_to_keep=batch["keep"]).logits[0]
    else:
        logits = original(**inputs).logits.flatten(0, 1)[batch["keep"]]
    return response_logps(logits, batch["targets"], batch["segments"], batch["lengths"].numel())


def logps(model: nn.Module, batch: dict[str, Tensor], *, own_logits: bool = False) -> Tensor:
    """Compute the [R] summed log-probs of a batch's responses, in fp32.

    Args:
        model: as trained, wrapped or not; `install` must have been called.
        batch: the result of `layout.padded_batch`, `layout.shared_prefix_batch` or `layout.single_batch`.
        own_logits: use the model's own logits instead of the chunked head; see `select.Layout`.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "spans") if name in batch}
    named = {name: batch[name] for name in ("keep", "targets", "segments", "lengths")}
    found: Tensor = model(**inputs, use_cache=False, spin_batch=named, own_logits=own_logits)
    return found


def disable_dropout(module: nn.Module) -> float:
    """Set every dropout rate of a module to 0 and return the largest previous rate.

    Dropout would make the policy differ from the opponent before the first step. Some models keep the rate as a plain
    float attribute such as `attention_dropout`.
    """
    plain = [name for name, value in vars(module).items() if name.endswith("dropout") and isinstance(value, float)]
    names = [*plain, "p"] if isinstance(module, nn.Dropout) else plain
    largest = max((getattr(module, name) for name in names), default=0.0)
    for name in names:
        setattr(module, name, 0.0)
    return float(largest)
