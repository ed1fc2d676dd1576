"""first_light.py's checks of our own kernels: shared-prefix attention and the chunked head."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from cases import DTYPES, Case, Found, Setting, in_bf16, llama, random_pairs, relative, to_device
from sides import PAD
from torch import Tensor
from torch.nn.functional import linear

from spin_plugin.model.attention import Scores, SharedPrefix, attend, dense_attention, dense_mask
from spin_plugin.model.forward import logps
from spin_plugin.model.layout import padded_batch, row_spans

KEY_HEADS = 2
SOFTCAP = 2.0  # scores have magnitude 1, so the cap matters
WINDOW = 48
# Tolerance in addition to twice the error of dense attention in the same precision, relative to the largest value:
# a few bf16 roundings; in fp32, the kernel's exponential, which differs from the C library's.
SLACK = {"bf16": 2**-6, "fp32": 1e-5}


class Layer(NamedTuple):
    """The parameters for which FlexAttention compiles a kernel."""

    dtype: str = "bf16"
    head_size: int = 128
    groups: int = 4
    softcap: float | None = None

    def __str__(self) -> str:
        capped = "" if self.softcap is None else " soft-capped"
        return f"{self.dtype} head {self.head_size} groups {self.groups}{capped}"


def layers(quick: bool) -> Iterator[tuple[Layer, tuple[int, ...]]]:
    """Yield layers, each with its row lengths. A compilation takes seconds, so only one parameter varies at a time."""
    short, usual, long = (84, 200, 400) if quick else (84, 300, 8192)
    for dtype in DTYPES:
        yield Layer(dtype), (short, usual, long)
        for head_size in (64, 80, 96, 256):
            yield Layer(dtype, head_size), (short, usual)
    for groups in (1, 8):
        yield Layer(groups=groups), (short, usual)
    yield Layer(softcap=SOFTCAP), (short, usual, long)
    yield Layer("fp32", softcap=SOFTCAP), (usual,)


def spans_of(tokens: int) -> list[tuple[int, int, int, int]]:
    """Spans [R, 4] of prompts that fill a row: one up to 100 tokens, else of uneven lengths, the last one long.

    The second and the last prompt have two synthetic responses, all others one.
    """
    rows, left = [], tokens
    while left > 100 and len(rows) < 12:
        size = min(100 + 37 * len(rows), left // 2)
        rows.append([size // 4, size // 2, size - size // 4 - size // 2])
        left -= size
    rows.append([left // 2, left // 4, left - left // 2 - left // 4])
    for prompt in {1, len(rows) - 1} & {*range(len(rows))}:
        *others, last = rows[prompt]
        rows[prompt] = [*others, last - last // 2, last // 2] if last > 1 else rows[prompt]
    return row_spans(rows)


def values_and_gradients(attention: Callable[..., Tensor], states: list[Tensor], force: Tensor) -> list[Tensor]:
    """Return the output and the gradients of query, key and value for the output gradient `force`."""
    leaves = [tensor.detach().requires_grad_() for tensor in states]
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, force)]


def dense(states: list[Tensor], force: Tensor, mask: Tensor, scores: Scores, dtype: torch.dtype) -> list[Tensor]:
    """The same with `dense_attention` in `dtype`, one key head at a time because it materializes [H, T, T]."""
    groups = states[0].shape[1] // KEY_HEADS
    attention = partial(dense_attention, mask=mask, scores=scores)
    parts = []
    for head in range(KEY_HEADS):
        queries, keys = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
        part = [tensor[:, chosen].to(dtype) for tensor, chosen in zip(states, (queries, keys, keys), strict=True)]
        parts.append(values_and_gradients(attention, part, force[:, queries].to(dtype)))
    return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]


def compare(layer: Layer, tokens: int, window: int | None, setting: Setting) -> list[tuple[float, float]]:
    """Return the largest error of the output and of each gradient, each with its tolerance."""
    generator = torch.Generator().manual_seed(tokens)
    dtype, spans = DTYPES[layer.dtype], torch.tensor(spans_of(tokens))
    many, few = (1, KEY_HEADS * layer.groups, tokens, layer.head_size), (1, KEY_HEADS, tokens, layer.head_size)
    query, key, value, force = (
        torch.randn(shape, generator=generator).to(setting.device, dtype) for shape in (many, few, few, many)
    )
    shared = SharedPrefix(spans.to(setting.device), tokens)

    def ours(*states: Tensor) -> Tensor:
        own = {"spans": shared, "sliding_window": window, "softcap": layer.softcap}
        return attend(torch.nn.Module(), *states, None, **own)[0].transpose(1, 2)

    states, scores = [query, key, value], Scores(None, window, layer.softcap)
    mask = dense_mask(spans, tokens, window).to(setting.device)
    exact = dense(states, force, mask, scores, torch.float64)
    naive = dense(states, force, mask, scores, dtype)
    found = values_and_gradients(ours, states, force)
    return [
        (_max_error(one, right), 2 * _max_error(plain, right) + SLACK[layer.dtype] * right.abs().max().item())
        for one, plain, right in zip(found, naive, exact, strict=True)
    ]


def _max_error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item()


def attention_row(layer: Layer, tokens: int, setting: Setting) -> Found:
    errors = [pair for window in (None, WINDOW) for pair in compare(layer, tokens, window, setting)]
    numbers = {
        "values": max(error for error, _ in errors[::4]),
        "gradients": max(error for number, (error, _) in enumerate(errors) if number % 4),
        "of what is allowed": max(error / allowed for error, allowed in errors),
    }
    return Found(all(error <= allowed for error, allowed in errors), numbers)


def attention(setting: Setting) -> Iterator[Case]:
    """`attend` against `dense_attention` in fp64: values and gradients, with and without a window."""
    for layer, lengths in layers(setting.quick):
        torch.compiler.reset()  # a run has one kind of layer, and Dynamo recompiles a function only eight times
        for tokens in lengths:
            yield f"{layer} T={tokens}", partial(attention_row, layer, tokens, setting)


def head_row(setting: Setting) -> Found:
    """The head under bf16 autocast against fp64 on the same rounded operands, compared with plain bf16 logits."""
    hidden, vocab = (64, 500) if setting.quick else (2048, 128_256)
    model = llama(setting, hidden=hidden, layers=0, heads=hidden // 64, groups=1, vocab=vocab)
    batch = to_device(padded_batch(random_pairs(setting, 4, vocab), PAD), setting)
    with torch.no_grad(), in_bf16(setting):
        states = model.model(input_ids=batch["input_ids"])[0].flatten(0, 1)[batch["keep"]].bfloat16()
    weight = model.lm_head.weight.detach().bfloat16()
    force = torch.randn(len(batch["lengths"]), generator=torch.Generator().manual_seed(0)).to(setting.device)

    def naive_head(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return log-probs [R] and the weight's gradient, from full logits in `dtype`."""
        leaf = weight.to(dtype).requires_grad_()
        logits = linear(states.to(dtype), leaf)
        logits = logits if dtype == torch.float64 else logits.float()
        chosen = logits.log_softmax(-1).gather(-1, batch["targets"][:, None])[:, 0]
        values = torch.zeros(len(force), dtype=chosen.dtype, device=chosen.device).index_add(
            0, batch["segments"], chosen
        )
        return values.detach(), torch.autograd.grad(values, leaf, force.to(values.dtype))[0]

    exact, naive = naive_head(torch.float64), naive_head(torch.bfloat16)
    with in_bf16(setting):
        found = logps(model, batch)
    (found * force).sum().backward()
    values, gradient = (found.detach() - exact[0]).abs().max().item(), relative(model.lm_head.weight.grad, exact[1])
    plain, plain_gradient = (naive[0] - exact[0]).abs().max().item(), relative(naive[1], exact[1])
    numbers = {"nats a response": values, "plain bf16": plain, "gradient": gradient, "plain gradient": plain_gradient}
    return Found(values <= 2 * plain + 1e-3 and gradient <= 2 * plain_gradient, numbers)


def head(setting: Setting) -> Iterator[Case]:
    """The chunked head in bf16 against fp64."""
    yield "bf16 against fp64", partial(head_row, setting)
