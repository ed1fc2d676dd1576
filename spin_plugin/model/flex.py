"""FlexAttention on CUDA: the block mask, the options that make its kernels fit the card, and how it is compiled.

`spin_plugin.model.attention` says which keys a query sees, as `Ranges`; here they become the kernel's arguments.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention skips or computes the mask in blocks of this many queries and keys
KILOBYTE = 1024


class Ranges(NamedTuple):
    """The keys each query sees: `prompt_from <= key < prompt_to` or `own_from <= key <= query`; all [T] int32.

    A range may be empty; the two never overlap.
    """

    prompt_from: Tensor
    prompt_to: Tensor
    own_from: Tensor


# --- the block mask ------------------------------------------------------------------------------


def block_mask(ranges: Ranges, tokens: int) -> BlockMask:
    """FlexAttention's mask of a row of T tokens, with N = T / 128 blocks; nothing larger than [N, N] or [T] is made."""

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompt = (key >= ranges.prompt_from[query]) & (key < ranges.prompt_to[query])
        return prompt | ((key >= ranges.own_from[query]) & (key <= query))

    own_to = torch.arange(1, tokens + 1, dtype=torch.int32, device=ranges.own_from.device)
    some_prompt, whole_prompt = _holders(ranges.prompt_from, ranges.prompt_to)
    some_own, whole_own = _holders(ranges.own_from, own_to)
    # a last, incomplete block of queries has fewer than 128 and never counts as full
    full = whole_prompt + whole_own == BLOCK
    partial = (some_prompt + some_own > 0) & ~full
    options: dict[str, Any] = {"BLOCK_SIZE": BLOCK, "mask_mod": sees, "seq_lengths": (tokens, tokens)}
    return BlockMask.from_kv_blocks(*_ordered(partial), *_ordered(full), **options)


def _holders(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] int32: how many queries of a block have a key of a key block in their range of keys, and how many all."""
    some = _counts(first // BLOCK, -(-end // BLOCK) * (first < end))
    return some, _counts(-(-first // BLOCK), end // BLOCK)


def _counts(first: Tensor, end: Tensor) -> Tensor:
    """[N, N] int32: how many queries of each block have each key block in their range of blocks, from first to end [T].

    A range adds one at its first block and takes it away at its end; the running sum counts the ranges.
    """
    blocks = -(-len(first) // BLOCK)
    row = torch.arange(len(first), dtype=torch.int32, device=first.device) // BLOCK * (blocks + 1)
    one = torch.ones_like(first)
    changes = torch.zeros(blocks * (blocks + 1), dtype=torch.int32, device=first.device)
    changes.index_add_(0, row + first, one).index_add_(0, row + end.maximum(first), -one)
    return changes.view(blocks, blocks + 1).cumsum(1, dtype=torch.int32)[:, :blocks]


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] boolean to FlexAttention's counts [1, 1, N] and indices [1, 1, N, N], the chosen ones first."""
    indices = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None]


# --- the kernels ---------------------------------------------------------------------------------


def kernel_options(head_size: int, dtype: torch.dtype, shared_memory: int | None) -> dict[str, Any]:
    """FlexAttention's options for a card with so many bytes of shared memory a block.

    `BACKEND: TRITON` is the ordinary kernel for rows of every length: left alone, torch takes its decoding
    kernel below 128 tokens, which exists for some numbers of heads and tokens and not for others.

    torch 2.13's own block sizes need, in KB of shared memory (bf16, 32 query heads, 8 key heads, forward / backward;
    compiled by Triton 3.7 and 3.9). Where they do not fit, Inductor tries one stage (*) instead of two or three:

        card (limit)         head size 64    128         256
        sm_80  (163)         50 / 35         96 / 67     148 / 133
        sm_86, sm_89 (99)    50 / 35         96 / 84     52* / 112*, over the limit
        sm_90  (227)         114 / 83        134 / 163   128 / 193
        sm_100 (227)         115 / 99        134 / 195   130 / 128
        sm_120 (99)          34 / 35         64 / 56     84 / 112, over the limit

    The backward with blocks of 32 needs 69 KB at head size 256; sizes between 128 and 256 are padded to 256.

    Args:
        shared_memory: None where the card does not tell (ROCm); torch's own block sizes are left alone.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    padded_to_256 = 128 < head_size <= 256
    too_small = shared_memory is not None and 69 * KILOBYTE <= shared_memory < 112 * KILOBYTE
    if padded_to_256 and too_small and dtype.itemsize == 2:  # with fp32 torch's own blocks are smaller than these
        options |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
    return options


def _shared_memory(device: torch.device) -> int | None:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


@cache
def _compiled() -> Any:
    # dynamic: every micro-batch has another length, and a compilation takes longer than many steps
    return torch.compile(flex_attention, dynamic=True)


def _compiler() -> Any:
    """The compiler's settings, which hold where something is called for the first time."""
    return torch._dynamo.config.patch(
        # torch 2.13 does not compile a score_mod that captures a float which might change ("unbacked_bindings")
        specialize_float=True,
        # Eager FlexAttention holds [H, T, T]. It must not begin in silence, neither because `torch_compile: true` has
        # told the compiler to swallow errors, nor after more graphs than it likes: up to six for each kind of layer, of
        # which Gemma 4 has two.
        suppress_errors=False,
        recompile_limit=64,
    )


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    score_mod: Callable[..., Tensor] | None,
) -> Tensor:
    """Attention [1, H, T, D] of query [1, H, T, D], key and value [1, H or fewer, T, D], under the mask.

    Args:
        scaling: None is 1 / sqrt(D).
        score_mod: what is done to each product after scaling, as FlexAttention calls it, or nothing.
    """
    options = kernel_options(query.shape[-1], query.dtype, _shared_memory(query.device))
    grouped = key.shape[1] != query.shape[1]
    # In a model that is compiled as a whole the settings are where its graph breaks off: this is compiled by itself.
    with _compiler():
        return _compiled()(
            query, key, value, score_mod, mask, scale=scaling, enable_gqa=grouped, kernel_options=options
        )
