"""Which models can use the shared-prefix layout, judging by their class and configuration."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


def causal_lm(model: Any) -> Any:
    """Unwrap the transformers model from DDP, torch.compile and PEFT."""
    for wrapper in ("module", "_orig_mod"):
        while isinstance(getattr(model, wrapper, None), nn.Module):
            model = getattr(model, wrapper)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family(inner: nn.Module) -> type:
    """Return the model's original class: FSDP2 replaces it with a subclass."""
    return next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))


def needs_own_logits(inner: Any) -> bool:
    """Return whether the model has no head, or one that is part of its decoder (Llama 4)."""
    head, decoder = inner.get_output_embeddings(), inner.get_decoder()
    return head is None or any(module is head for module in decoder.modules())


def unsupported_reason(model: nn.Module) -> str | None:
    """Return in one line why a causal LM, wrapped or not, needs the padded layout, or None.

    Unknown models need it.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "prompt tuning prepends virtual tokens to each row"
    inner = causal_lm(model)
    return next((f"{family(inner).__name__} {fault}" for found, fault in _faults(inner) if found), None)


def _faults(inner: Any) -> Iterator[tuple[bool, str]]:
    """Yield each possible obstacle and whether it applies.

    The order matters: each check may rely on the previous ones having passed.
    """
    known = isinstance(inner, PreTrainedModel) and family(inner).__module__.startswith("transformers.models.")
    yield not known, "is not one of transformers' own models"
    config: Any = inner.config
    yield config.is_encoder_decoder, "is an encoder-decoder"
    yield config.get_text_config() is not config, "is multimodal"
    yield inner._is_stateful, "has state-space or linear attention layers"
    pluggable = inner._supports_attention_backend and inner._can_set_attn_implementation()
    yield not pluggable, "does not use transformers' AttentionInterface"
    unsupported = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    yield bool(unsupported), f"has unsupported layer types ({', '.join(sorted(unsupported))})"
    chunked_or_biased = getattr(config, "attention_chunk_size", None) or getattr(config, "alibi", None)
    yield bool(chunked_or_biased), "uses chunked attention or a position bias"
    yield getattr(config, "is_causal", True) is False, "is not causal"
    yield any(name.endswith(".sinks") for name, _ in inner.named_parameters()), "has attention sinks"
    parameters = inspect.signature(inner.get_decoder().forward).parameters
    yield "position_ids" not in parameters, "takes no position_ids"
    yield "kwargs" not in parameters, "does not pass keywords on to its attention"
