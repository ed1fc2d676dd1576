"""FlexAttention on CUDA: the block mask, kernel options that fit the GPU, and compilation.

`spin_plugin.model.attention` describes the visible keys as `Ranges`; this module turns them into kernel arguments.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # queries and keys per block that FlexAttention skips, masks or computes entirely
KILOBYTE = 1024


class Ranges(NamedTuple):
    """The keys visible to each query: `prompt_from <= key < prompt_to` or `own_from <= key <= query`; [T] int32 each.

    The prompt range can be empty, and the two ranges never overlap.
    """

    prompt_from: Tensor
    prompt_to: Tensor
    own_from: Tensor


# --- the block mask ------------------------------------------------------------------------------


def block_mask(ranges: Ranges, tokens: int) -> BlockMask:
    """Build FlexAttention's mask for a row of T tokens in N = ceil(T / 128) blocks.

    Allocates nothing larger than [N, N] or [T].
    """

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompt = (key >= ranges.prompt_from[query]) & (key < ranges.prompt_to[query])
        return prompt | ((key >= ranges.own_from[query]) & (key <= query))

    own_to = torch.arange(1, tokens + 1, dtype=torch.int32, device=ranges.own_from.device)
    some_prompt, all_prompt = _queries_per_block(ranges.prompt_from, ranges.prompt_to)
    some_own, all_own = _queries_per_block(ranges.own_from, own_to)
    # An incomplete last block has fewer than 128 queries and is never full.
    full = all_prompt + all_own == BLOCK
    partial = (some_prompt + some_own > 0) & ~full
    options: dict[str, Any] = {"BLOCK_SIZE": BLOCK, "mask_mod": visible, "seq_lengths": (tokens, tokens)}
    return BlockMask.from_kv_blocks(*_ordered(partial), *_ordered(full), **options)


def _queries_per_block(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Count queries per query block and key block, [N, N] int32 each.

    The first counts queries whose key range contains some key of the key block, the second all of its keys.
    """
    some = _counts(first // BLOCK, -(-end // BLOCK) * (first < end))
    return some, _counts(-(-first // BLOCK), end // BLOCK)


def _counts(first: Tensor, end: Tensor) -> Tensor:
    """Count, for each query block and key block, the queries whose block range `first <= block < end` contains it.

    Each range adds 1 at its first block and subtracts 1 at its end; the cumulative sum counts the ranges.

    Args:
        first, end: [T] int32, in blocks.

    Returns:
        [N, N] int32.
    """
    blocks = -(-len(first) // BLOCK)
    row = torch.arange(len(first), dtype=torch.int32, device=first.device) // BLOCK * (blocks + 1)
    one = torch.ones_like(first)
    changes = torch.zeros(blocks * (blocks + 1), dtype=torch.int32, device=first.device)
    changes.index_add_(0, row + first, one).index_add_(0, row + end.maximum(first), -one)
    return changes.view(blocks, blocks + 1).cumsum(1, dtype=torch.int32)[:, :blocks]


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Convert an [N, N] boolean to FlexAttention's counts [1, 1, N] and indices [1, 1, N, N], chosen blocks first."""
    indices = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None]


# --- the kernels ---------------------------------------------------------------------------------


def kernel_options(head_size: int, dtype: torch.dtype, shared_memory: int | None) -> dict[str, Any]:
    """Return FlexAttention's options for a GPU with this much shared memory per block.

    `BACKEND: TRITON` selects the regular kernel for rows of every length. Below 128 tokens, torch would otherwise
    choose its decoding kernel, which does not support all numbers of heads and tokens.

    Shared memory in KB that torch 2.13's default block sizes need (bf16, 32 query heads, 8 key heads, forward /
    backward; compiled with Triton 3.7 and 3.9). If they do not fit, Inductor retries with one stage (*):

        GPU (limit)          head size 64    128         256
        sm_80  (163)         50 / 35         96 / 67     148 / 133
        sm_86, sm_89 (99)    50 / 35         96 / 84     52* / 112*, over the limit
        sm_90  (227)         114 / 83        134 / 163   128 / 193
        sm_100 (227)         115 / 99        134 / 195   130 / 128
        sm_120 (99)          34 / 35         64 / 56     84 / 112, over the limit

    With blocks of 32, the backward needs 69 KB at head size 256. Sizes between 128 and 256 are padded to 256.

    Args:
        shared_memory: in bytes; None if the driver does not report it (ROCm), which keeps torch's block sizes.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    padded_to_256 = 128 < head_size <= 256
    too_small = shared_memory is not None and 69 * KILOBYTE <= shared_memory < 112 * KILOBYTE
    if padded_to_256 and too_small and dtype.itemsize == 2:  # torch's fp32 blocks are already smaller
        options |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
    return options


def _shared_memory(device: torch.device) -> int | None:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


@cache
def _compiled() -> Any:
    # dynamic, because the length varies per micro-batch and a compilation takes longer than many steps
    return torch.compile(flex_attention, dynamic=True)


def _compiler() -> Any:
    """Patch the compiler settings; they take effect whenever a call compiles."""
    return torch._dynamo.config.patch(
        # torch 2.13 cannot compile a score_mod that captures a dynamic float ("unbacked_bindings").
        specialize_float=True,
        # Never fall back silently to eager FlexAttention, which allocates [H, T, T]: neither on errors, which
        # `torch_compile: true` suppresses, nor at the recompile limit. Each kind of layer needs up to six graphs, and
        # Gemma 4 has two kinds.
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
    """Compiled attention [1, H, T, D] of query [1, H, T, D], key and value [1, H or fewer, T, D].

    Args:
        mask: the result of `block_mask`.
        scaling: None means 1 / sqrt(D).
        score_mod: applied to each scaled product, with FlexAttention's signature.
    """
    options = kernel_options(query.shape[-1], query.dtype, _shared_memory(query.device))
    grouped = key.shape[1] != query.shape[1]
    # Inside a compiled model, patching the settings breaks the graph, so this call is compiled separately.
    with _compiler():
        return _compiled()(
            query, key, value, score_mod, mask, scale=scaling, enable_gqa=grouped, kernel_options=options
        )
