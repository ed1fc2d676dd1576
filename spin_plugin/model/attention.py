"""Attention for the shared-prefix layout: each response attends to its prompt and itself only.

Importing this module registers `attend` with transformers' AttentionInterface under `NAME`; `enable` makes a model use
it. The keyword `spans` (see `spin_plugin.model.layout.shared_prefix_batch`), which transformers passes to every
attention layer, selects shared-prefix attention. Without it `attend` is plain SDPA, so the same model also accepts
padded batches.

The fast paths are one SDPA call per response on CPU, and FlexAttention with a block mask on CUDA. `dense_mask` and
`dense_attention` are their slow reference.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spin_plugin.model.flex import Ranges, block_mask, flex
from spin_plugin.model.support import causal_lm

NAME = "spin_shared_prefix"


# --- the reference -----------------------------------------------------------------------------


def dense_mask(spans: Tensor, tokens: int, window: int | None = None) -> Tensor:
    """Return [T, T] boolean: whether a query (row) may attend to a key (column).

    Args:
        spans: [R, 4] as in `shared_prefix_batch`.
        tokens: T.
        window: the sliding window in positions, if any.
    """
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, prompt, response, length in spans.tolist():
        sequence = [*range(start, start + prompt), *range(response, response + length)]
        for position, query in enumerate(sequence):
            first = 0 if window is None else max(0, position + 1 - window)
            mask[query, sequence[first : position + 1]] = True
    return mask


class Scores(NamedTuple):
    """How a layer turns the products of queries and keys into attention scores."""

    scaling: float | None = None  # None: 1 / sqrt(head size)
    window: int | None = None  # positions that a query attends to at most, including itself
    softcap: float | None = None


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Apply Gemma 2's soft-capping."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Reference attention: [1, H, Q, D] of query [1, H, Q, D], key and value [1, H or fewer, S, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    products = query @ key.mT * (query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    weights = _capped(products, scores.softcap).masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


# --- state shared by all layers ----------------------------------------------------------------


class SharedPrefix:
    """The spans [R, 4] of a row of T tokens, with the masks derived from them cached for all layers."""

    def __init__(self, spans: Tensor, tokens: int) -> None:
        self.spans, self.tokens = spans, tokens
        self._block_masks: dict[int | None, BlockMask] = {}

    @cached_property
    def rows(self) -> list[list[int]]:
        """The spans as Python ints. Synchronizes with the device, so only the CPU path uses it."""
        return self.spans.tolist()

    def ranges(self, window: int | None) -> Ranges:
        """Return the mask as ranges of keys. For prompt and real tokens, the own range covers all visible keys."""
        start, prompt, response, length = self.spans.int().unbind(1)
        gap = response - start - prompt  # tokens of other responses in between; 0 after the prompt
        own_tokens = torch.where(gap == 0, prompt + length, length)
        index = torch.repeat_interleave(own_tokens, output_size=self.tokens)  # a known size avoids a sync
        token = torch.arange(self.tokens, dtype=torch.int32, device=self.spans.device)
        start, prompt, response, gap = start[index], prompt[index], response[index], gap[index]
        prompt_from, prompt_to = start, torch.where(gap == 0, start, start + prompt)
        own_from = torch.where(gap == 0, start, response)
        if window is not None:
            # The responses in between do not count towards the distance.
            prompt_from = prompt_from.maximum(token - gap + 1 - window)
            own_from = own_from.maximum(token + 1 - window)
        return Ranges(prompt_from, prompt_to, own_from)

    def block_mask(self, window: int | None) -> BlockMask:
        """Return FlexAttention's block mask, computed once per window."""
        if window not in self._block_masks:
            self._block_masks[window] = block_mask(self.ranges(window), self.tokens)
        return self._block_masks[window]


# --- the attention function --------------------------------------------------------------------


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    spans: Tensor | SharedPrefix | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: [1, T, H, D] of query [1, H, T, D], key and value [1, H or fewer, T, D].

    Args:
        attention_mask, dropout: used for padded batches only; dropout would make the policy differ from the opponent.
        spans: [R, 4] of a shared-prefix row, preferably wrapped in one `SharedPrefix` for all layers.

    Raises:
        ValueError: the model uses attention sinks or a position bias with the shared-prefix layout.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    refused = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if refused:
        raise ValueError(f"spin.shared_prefix: attention with {refused[0]} is not supported; set it to off")
    shared = SharedPrefix(spans, query.shape[2]) if isinstance(spans, Tensor) else spans
    assert query.shape[0] == 1 and key.shape[2] == shared.tokens, "a shared-prefix batch is one row, without a KV cache"
    attention: Callable[..., Tensor] = _by_blocks if query.is_cuda else _by_pair
    output = attention(query, key, value, shared, Scores(scaling, sliding_window, softcap))
    return output.transpose(1, 2).contiguous(), None


def _by_pair(query: Tensor, key: Tensor, value: Tensor, shared: SharedPrefix, scores: Scores) -> Tensor:
    """Compute [1, H, T, D] with one SDPA call per response, each only over the visible keys.

    Uses `split` because the gradient of a slice is as long as the row, which would take half the time.
    """
    follows = [response == start + prompt for start, prompt, response, _ in shared.rows]  # its prompt directly
    sizes = [length + prompt * first for (_, prompt, _, length), first in zip(shared.rows, follows, strict=True)]
    parts = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for (_, prompt, *_), first, (own_query, *own) in zip(shared.rows, follows, parts, strict=True):
        if first:
            prefix, visible = [states[:, :, :prompt] for states in own], own
        else:
            visible = [torch.cat(states, dim=2) for states in zip(prefix, own, strict=True)]
        outputs.append(_causal(own_query, visible[0], visible[1], scores))
    return torch.cat(outputs, dim=2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Causal attention of the last Q of S positions over all S."""
    (queries, keys), mask, window = (query.shape[2], key.shape[2]), None, scores.window
    if queries < keys or scores.softcap is not None or (window is not None and window < keys):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        mask = mask if window is None else mask.triu(keys - queries + 1 - window)
    if mask is not None and scores.softcap is not None:  # SDPA has no soft-capping
        return dense_attention(query, key, value, mask, scores)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scaling, enable_gqa=grouped
    )


def compute_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of the attention computation.

    Under autocast, queries and keys can still have the dtype of the rotary embedding.
    """
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, shared: SharedPrefix, scores: Scores) -> Tensor:
    """Compute [1, H, T, D] with FlexAttention, skipping blocks without a visible key."""
    heads, dtype = query.shape[1], compute_dtype(query)
    query, key, value = (states.to(dtype) for states in (query, key, value))  # the kernel options depend on the dtype
    if heads & (heads - 1):
        # Like transformers, do not use FlexAttention's grouped heads unless their number is a power of 2.
        key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return _capped(score, scores.softcap)

    score_mod = None if scores.softcap is None else capped
    return flex(query, key, value, shared.block_mask(scores.window), scores.scaling, score_mod)


AttentionInterface.register(NAME, attend)
# Only used for padded batches: shared-prefix ones pass a ready-made mask (`shared_prefix_inputs`).
AttentionMaskInterface.register(NAME, sdpa_mask)


def shared_prefix_inputs(spans: Tensor, tokens: int) -> dict[str, Any]:
    """Return the keywords for a shared-prefix forward: the spans for all layers and a dummy mask.

    transformers passes a 4D mask through unchanged. Without one, it would detect that positions restart and build a
    boolean [T, T].
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=spans.device)
    return {"spans": SharedPrefix(spans, tokens), "attention_mask": mask}


def enable(model: nn.Module) -> None:
    """Make the model use `attend`, permanently, because gradient checkpointing reruns layers outside the forward."""
    causal_lm(model).set_attn_implementation(NAME)
