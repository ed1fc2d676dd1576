"""Which models can share prefixes, told by their class and configuration."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

# --- which models can ----------------------------------------------------------------------------


def causal_lm(model: Any) -> Any:
    """The transformers model inside DDP's, torch.compile's and PEFT's wrappers."""
    for wrapper in ("module", "_orig_mod"):
        while isinstance(getattr(model, wrapper, None), nn.Module):
            model = getattr(model, wrapper)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family(inner: nn.Module) -> type:
    """The class that a model had before FSDP put one of its own in front."""
    return next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))


def needs_own_logits(inner: Any) -> bool:
    """Whether a model has no head, or one that its decoder applies itself (Llama 4)."""
    head, decoder = inner.get_output_embeddings(), inner.get_decoder()
    return head is None or any(module is head for module in decoder.modules())


def unsupported_reason(model: nn.Module) -> str | None:
    """Why a causal LM, wrapped or not, must use the padded form, in one line, or None. What is unknown must."""
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "prompt tuning puts tokens of its own before the row"
    inner = causal_lm(model)
    return next((f"{family(inner).__name__} {fault}" for found, fault in _faults(inner) if found), None)


def _faults(inner: Any) -> Iterator[tuple[bool, str]]:
    """What may be wrong, in an order in which what was not found lets the next be read."""
    known = isinstance(inner, PreTrainedModel) and family(inner).__module__.startswith("transformers.models.")
    yield not known, "is not one of transformers' own models"
    config: Any = inner.config
    yield config.is_encoder_decoder, "is an encoder-decoder"
    yield config.get_text_config() is not config, "is multimodal"
    yield inner._is_stateful, "has state-space or linear attention layers"
    through = inner._supports_attention_backend and inner._can_set_attn_implementation()
    yield not through, "does not use transformers' AttentionInterface"
    strange = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    yield bool(strange), f"has layers of another kind ({', '.join(sorted(strange))})"
    odd = getattr(config, "attention_chunk_size", None) or getattr(config, "alibi", None)
    yield bool(odd), "attends in chunks or with a position bias"
    yield getattr(config, "is_causal", True) is False, "is not causal"
    yield any(name.endswith(".sinks") for name, _ in inner.named_parameters()), "has attention sinks"
    takes = inspect.signature(inner.get_decoder().forward).parameters
    yield "position_ids" not in takes, "takes no position_ids"
    yield "kwargs" not in takes, "hands no keywords down to its attention"
