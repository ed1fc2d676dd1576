"""The fast attention paths and their masks against the dense reference, and the models that support them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import SMALL
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spin_plugin.model import attention, flex
from spin_plugin.model.attention import Scores, SharedPrefix, attend, dense_attention, dense_mask, enable
from spin_plugin.model.flex import BLOCK
from spin_plugin.model.layout import row_spans
from spin_plugin.model.support import unsupported_reason

WINDOWS = [None, 1, 5, 150]


def random_spans(seed: int, *max_lengths: int) -> tuple[Tensor, int]:
    """Return the spans of a few prompts with one to three synthetic responses, and the row's length.

    Prompt, real and synthetic responses have up to `max_lengths` tokens.
    """
    rng = random.Random(seed)
    prompt, real, synthetic = max_lengths
    row = []
    for _ in range(rng.randint(1, 4)):
        limits = [prompt, real, *[synthetic] * rng.randint(1, 3)]
        row.append([rng.randint(1, limit) for limit in limits])
    return spans_of(row)


def spans_of(row: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """Return the spans of prompts with their responses, given their lengths, and the row's length."""
    return torch.tensor(row_spans(row)), sum(map(sum, row))


def random_states(tokens: int, heads: int = 4, shared_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(1, count, tokens, 16, requires_grad=True) for count in (heads, shared_heads, shared_heads)]


def test_dense_mask_by_hand() -> None:
    """A prompt 0 1 with real 2 3 and synthetic 4, then a prompt 5 with responses 6, 7 and 8 9."""
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 1, 1],
    ]
    spans = torch.tensor([[0, 2, 2, 2], [0, 2, 4, 1], [5, 1, 6, 1], [5, 1, 7, 1], [5, 1, 8, 2]])
    assert torch.equal(spans_of([[2, 2, 1], [1, 1, 1, 2]])[0], spans)
    assert dense_mask(spans, 10).int().tolist() == expected
    # With a window of 2, the first synthetic token sees the prompt's last token but not its first.
    assert dense_mask(spans, 10, window=2).int()[4].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert dense_mask(spans, 10, window=2).int()[9].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


LENGTHS = st.one_of(st.integers(1, 5), st.integers(1, 60), st.integers(120, 140), st.integers(1, 300))


@settings(max_examples=40, deadline=None)
@given(
    row=st.lists(st.lists(LENGTHS, min_size=3, max_size=7), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 5, 127, 128, 129, 150]),
)
@example(row=[[128, 128, 128]], window=None)  # boundaries of pairs and blocks coincide
@example(row=[[300, 200, 300, 20], [1, 1, 1]], window=150)
def test_block_mask_is_the_dense_mask(row: list[list[int]], window: int | None) -> None:
    """Compare the mask function token by token, and the blocks: partial if some keys are visible, full if all are."""
    spans, tokens = spans_of(row)
    dense = dense_mask(spans, tokens, window)
    mask = SharedPrefix(spans, tokens).block_mask(window)
    assert {tensor.dtype for tensor in mask.as_tuple() if isinstance(tensor, Tensor)} == {torch.int32}
    index = torch.arange(tokens)
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index[None]), dense)
    blocks = -(-tokens // BLOCK)
    excess = blocks * BLOCK - tokens
    tiles = torch.nn.functional.pad(dense, (0, excess, 0, excess)).view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2)
    full = tiles.all(-1).all(-1)
    assert torch.equal(listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices), full)
    assert torch.equal(listed_blocks(mask.kv_num_blocks, mask.kv_indices), tiles.any(-1).any(-1) & ~full)


def listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Convert FlexAttention's counts and indices to an [N, N] boolean."""
    listed = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, places) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        listed[row, places[:count]] = True
    return listed


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 2)])
def test_by_pair_equals_dense(heads: tuple[int, int], window: int | None, softcap: float | None) -> None:
    spans, tokens = random_spans(7, 20, 30, 30)
    states = random_states(tokens, *heads)
    scores = Scores(0.3, window, softcap)
    expected = dense_attention(*states, dense_mask(spans, tokens, window), scores)
    found = attend(torch.nn.Module(), *states, None, scaling=0.3, spans=spans, sliding_window=window, softcap=softcap)[
        0
    ].transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad((output * direction).sum(), states) for output in (found, expected)]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Return a function that replaces the compiled FlexAttention, so that the CUDA path runs on a CPU."""

    def kernel(replacement: Callable[..., Any]) -> None:
        monkeypatch.setattr(flex, "_compiled", lambda: replacement)
        monkeypatch.setattr(flex, "_shared_memory", lambda _: None)

    return kernel


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2)])
@pytest.mark.parametrize("window", [None, 50])
def test_by_blocks_equals_dense(kernel: Any, window: int | None, heads: tuple[int, int], softcap: float | None) -> None:
    """Run the CUDA path with eager FlexAttention; test_kernels.py covers the compiler."""
    kernel(flex_attention)
    spans, tokens = random_spans(3, 100, 150, 150)
    states = [state.detach() for state in random_states(tokens, *heads)]
    scores = Scores(None, window, softcap)
    expected = dense_attention(*states, dense_mask(spans, tokens, window), scores)
    found = attention._by_blocks(*states, SharedPrefix(spans, tokens), scores)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_never_falls_back_to_eager_mode(kernel: Any) -> None:
    """`torch_compile: true` enables that fallback, but eager FlexAttention would allocate [H, T, T]."""

    def broken(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no kernel")

    kernel(torch.compile(flex_attention, dynamic=True, backend=broken))
    spans, tokens = random_spans(3, 100, 150, 150)
    states = [state.detach() for state in random_states(tokens)]
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(BackendCompilerFailed, match="no kernel"):
        attention._by_blocks(*states, SharedPrefix(spans, tokens), Scores())


def test_attention_is_compiled_separately_from_a_compiled_model(kernel: Any) -> None:
    operators: dict[str, list[str]] = {"model": [], "attention": []}

    def recorder(part: str) -> Callable[..., Any]:
        def backend(graph: Any, _inputs: Any) -> Any:
            operators[part] += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return graph

        return backend

    kernel(torch.compile(flex_attention, dynamic=True, backend=recorder("attention")))
    spans, tokens = random_spans(3, 100, 150, 150)
    shared, states = SharedPrefix(spans, tokens), [state.detach() for state in random_states(tokens)]
    shared.block_mask(None)

    def layer(*states: Tensor) -> Tensor:
        return attention._by_blocks(*states, shared, Scores()) + 1

    with torch.no_grad():
        found = torch.compile(layer, backend=recorder("model"))(*states)
    torch.testing.assert_close(found, dense_attention(*states, dense_mask(spans, tokens), Scores()) + 1)
    assert "flex_attention" in operators["attention"]
    assert operators["model"] == ["<built-in function add>"]


def test_block_mask_is_cached_per_window() -> None:
    shared = SharedPrefix(*random_spans(0, 9, 9, 9))
    assert shared.block_mask(None) is shared.block_mask(None)
    assert shared.block_mask(4) is not shared.block_mask(None)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_unsupported_attention_options_are_refused(name: str) -> None:
    spans, tokens = random_spans(1, 4, 4, 4)
    with pytest.raises(ValueError, match=f"spin.shared_prefix: attention with {name} is not supported; set it to off"):
        attend(torch.nn.Module(), *random_states(tokens), None, spans=spans, **{name: torch.zeros(4)})


# --- models ----------------------------------------------------------------------------------------


def make(architecture: str, *, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SMALL | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"]
)
def test_supported(architecture: str) -> None:
    assert unsupported_reason(make(architecture)) is None


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("mamba", {}, "does not use|state-space"),
        ("jamba", {}, "state-space"),
        ("bloom", {}, "does not use transformers' AttentionInterface"),
        ("gpt_oss", {"num_local_experts": 2}, "attention sinks"),
        ("llama4_text", {}, "unsupported layer types|chunked attention"),
        ("qwen3_next", {"num_experts": 2}, "state-space or linear"),
    ],
)
def test_unsupported(architecture: str, changes: dict[str, Any], reason: str) -> None:
    with torch.device("meta"):
        model = make(architecture, **changes)
    found = unsupported_reason(model)
    assert found is not None
    assert found.startswith(type(model).__name__)
    assert any(part in found for part in reason.split("|"))


def test_custom_model_class_is_unsupported() -> None:
    class Custom(type(make("llama"))):  # type: ignore[misc]
        pass

    assert (
        unsupported_reason(Custom(AutoConfig.for_model("llama", **SMALL)))
        == "Custom is not one of transformers' own models"
    )


def test_saved_configuration_does_not_mention_shared_prefix_attention(tmp_path: Any) -> None:
    model = make("llama", attention="sdpa")
    enable(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_enable_does_not_change_padded_batches(architecture: str) -> None:
    model = make(architecture, attention="sdpa", **({"sliding_window": 4} if architecture == "mistral" else {}))
    ids = torch.randint(3, 250, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        enable(model)
        after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(before[mask.bool()], after[mask.bool()])
