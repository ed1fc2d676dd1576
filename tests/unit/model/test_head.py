"""The chunked head against full logits: values, gradients, memory, and the fallback for unsupported heads."""

import copy
import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import SMALL
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from spin_plugin.model import forward, head
from spin_plugin.model.forward import install, logps
from spin_plugin.model.head import LogitMap
from spin_plugin.model.layout import Pair, padded_batch, shared_prefix_batch
from spin_plugin.model.logprobs import response_logps
from spin_plugin.model.select import choose_layout

PAIRS = [Pair([5, 6, 7], [8, 9, 1], [10, 1]), Pair([11], [1], [12, 13, 14, 15, 16, 1]), Pair([3] * 5, [4] * 7, [9] * 3)]
PAD = 0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the few tokens of these tests into several chunks, the last one shorter."""
    monkeypatch.setattr(head, "CHUNK", 5)


def make(architecture: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(SMALL | changes))).float()


def random_inputs(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Return leaves (hidden states [13, 8], weight [50, 8], bias [50] or None), targets [13] and a direction [13]."""
    torch.manual_seed(2)
    shapes: list[tuple[int, ...]] = [(13, 8), (50, 8), (50,)]
    leaves: list[Tensor | None] = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return leaves if bias else [*leaves[:2], None], torch.randint(0, 50, (13,)), torch.randn(13)


CHUNK_BYTES = 5 * 50 * 8


@pytest.mark.parametrize("kept", [0, CHUNK_BYTES, 10 * CHUNK_BYTES])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(scale=0.3), LogitMap(cap=1.5), LogitMap(2.0, 1.5)])
def test_linear_logps_equals_the_formula(logit_map: LogitMap, bias: bool, kept: int) -> None:
    leaves, targets, direction = random_inputs(bias)
    inputs = [leaf for leaf in leaves if leaf is not None]
    found = head._LinearLogps.apply(*leaves, targets, logit_map, kept)
    logits = logit_map(linear(*leaves))  # type: ignore[arg-type]
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad((output * direction).sum(), inputs) for output in (found, expected)]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 10 * CHUNK_BYTES])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_16_bit_models_are_not_rounded(bias: bool, kept: int) -> None:
    """Values equal those of fp64 on the same 16-bit inputs; gradients are rounded only once, on output."""
    leaves, targets, direction = random_inputs(bias, torch.bfloat16)
    inputs = [leaf for leaf in leaves if leaf is not None]
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    found = head._LinearLogps.apply(*leaves, targets, LogitMap(scale=8.0), kept)
    logits = linear(*exact) * 8.0
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    gradients = torch.autograd.grad((found * direction).sum(), inputs)
    references = torch.autograd.grad((expected * direction).sum(), exact)
    for ours, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=0.02, atol=0.02 * reference.abs().max().item())


def test_kept_logits_are_limited_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 16-bit weights are fp32: the limit fits one chunk, not the two that 16-bit logits would allow."""
    rows: list[int] = []
    logits = head._logits
    monkeypatch.setattr(head, "_logits", lambda states, *weights: rows.append(len(states)) or logits(states, *weights))
    leaves, targets, _ = random_inputs(bias=False, dtype=torch.bfloat16)
    head._LinearLogps.apply(*leaves, targets, LogitMap(), 5 * 50 * 4).sum().backward()
    assert rows == [5, 5, 3, 5, 3]


def test_frozen_weight_gets_no_gradient() -> None:
    (hidden, weight, _), targets, _ = random_inputs(bias=False)
    assert hidden is not None
    assert weight is not None
    head._LinearLogps.apply(hidden, weight.requires_grad_(False), None, targets, LogitMap(), 0).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("kept", "forward_and_backward"),
    [(0, [5, 5, 3, 5, 5, 3]), (CHUNK_BYTES, [5, 5, 3, 5, 3]), (10 * CHUNK_BYTES, [5, 5, 3])],
)
def test_logits_are_computed_in_chunks(
    monkeypatch: pytest.MonkeyPatch, kept: int, forward_and_backward: list[int]
) -> None:
    """Logits are never computed for more positions than a chunk; those not kept are recomputed in the backward."""
    rows: list[int] = []

    def recorded(states: Tensor, *weights: Tensor) -> Tensor:
        rows.append(len(states))
        return linear(states, *weights)

    monkeypatch.setattr(head, "linear", recorded)
    leaves, targets, _ = random_inputs(bias=False)
    head._LinearLogps.apply(*leaves, targets, LogitMap(), kept).sum().backward()
    assert rows == forward_and_backward


def test_no_logits_are_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    function = head._LinearLogps

    class Recorded:
        @staticmethod
        def apply(*arguments: Any) -> Tensor:
            kept.append(arguments[-1])
            return function.apply(*arguments)

    monkeypatch.setattr(head, "_LinearLogps", Recorded)
    model = make()
    install(model)
    with torch.no_grad():
        logps(model, padded_batch(PAIRS, PAD))
    logps(model, padded_batch(PAIRS, PAD))
    assert kept == [0, head.KEPT]


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {}, LogitMap()),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitMap(cap=30.0)),
        ("granite", {"logits_scaling": 4.0}, LogitMap(scale=0.25)),
        ("cohere", {"logit_scale": 0.0625}, LogitMap(scale=0.0625)),
    ],
)
def test_logit_map_of(architecture: str, changes: dict[str, float], expected: LogitMap) -> None:
    assert LogitMap.of(AutoConfig.for_model(architecture, **changes)) == expected


def test_install_does_not_change_the_models_own_forward() -> None:
    model = make()
    ids = torch.tensor([[5, 6, 7]])
    before, signature = model(input_ids=ids, labels=ids), inspect.signature(model.forward)
    install(model)
    install(model)
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert inspect.signature(model.forward) == signature
    assert model.state_dict().keys() == make().state_dict().keys()


def test_deep_copy_uses_its_own_weights() -> None:
    model = make()
    install(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = logps(model, padded_batch(PAIRS, PAD))
        twin.lm_head.weight.zero_()
        assert torch.equal(logps(model, padded_batch(PAIRS, PAD)), before)
        uniform = -torch.tensor(float(SMALL["vocab_size"])).log() * padded_batch(PAIRS, PAD)["lengths"]
        torch.testing.assert_close(logps(twin, padded_batch(PAIRS, PAD)), uniform)


class Wrapper(nn.Module):
    """Wrap a model like DDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_wrapped_model() -> None:
    model = make()
    install(Wrapper(model))
    batch = padded_batch(PAIRS, PAD)
    assert torch.equal(logps(Wrapper(model), batch), logps(model, batch))


def test_head_is_called_once() -> None:
    """ZeRO-3 and FSDP gather its weights on every call, so ranks with different numbers of calls would hang."""
    model, calls = make(), []
    install(model)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    logps(model, padded_batch(PAIRS, PAD)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_lora_on_the_head_is_chunked_unless_sharded(sharded: bool) -> None:
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    install(model)
    adapted, calls = model.get_base_model().lm_head, []
    if sharded:
        adapted.base_layer.weight.ds_id = 0  # DeepSpeed's mark on ZeRO-3 parameters
    adapted.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = logps(model, padded_batch(PAIRS, PAD))
        kept = len(padded_batch(PAIRS, PAD)["keep"])
        assert len(calls) == (1 if sharded else -(-kept // head.CHUNK))
        torch.testing.assert_close(found, logps(model, padded_batch(PAIRS, PAD), own_logits=True))


def test_number_of_chunks_does_not_trigger_recompilation() -> None:
    """`torch_compile` would unroll the loop over the chunks for each number of them, here 2 to 11."""
    model, counter, graphs = make(), CompileCounter(), []
    install(model)
    compiled = torch.compile(model, backend=counter)
    for kept in (3, 5, 14, 25):
        pair = Pair([5] * (40 - kept), [8] * kept, [9] * kept)
        with torch.no_grad():
            expected = logps(model, padded_batch([pair], PAD))
            torch.testing.assert_close(logps(compiled, padded_batch([pair], PAD)), expected)
        graphs.append(counter.frame_count)
    assert graphs[1] >= 1
    assert len(set(graphs[1:])) == 1, graphs


# --- fallback --------------------------------------------------------------------------------------


class CustomHead(LlamaForCausalLM):
    """Transforms its logits in an unsupported way."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3 + torch.arange(outputs.logits.shape[-1]) / 100
        return outputs


def test_unsupported_head_falls_back_to_the_models_own_logits() -> None:
    torch.manual_seed(1)
    model = CustomHead(AutoConfig.for_model("llama", **SMALL))
    install(model)
    layout = choose_layout(model, [PAIRS], requested=True, pad_token_id=PAD)
    assert layout == (False, True, "CustomHead is not one of transformers' own models")
    batch = padded_batch(PAIRS, PAD)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    expected = response_logps(logits[batch["keep"]], batch["targets"], batch["segments"], 2 * len(PAIRS))
    assert torch.equal(logps(model, batch, own_logits=True), expected)


def test_head_that_is_part_of_the_decoder_falls_back() -> None:
    """Llama 4's decoder is the entire model, including the head."""
    changes = {"num_local_experts": 2, "intermediate_size_mlp": 96}
    model = make("llama4_text", **changes)
    install(model)
    assert choose_layout(model, [PAIRS], requested=True, pad_token_id=PAD).own_logits


def test_shared_prefix_with_wrong_values_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is supported by its class and configuration."""
    model = make()
    install(model)
    monkeypatch.setattr(forward, "shared_prefix_inputs", lambda spans, tokens: {"spans": None})
    layout = choose_layout(model, [PAIRS], requested=True, pad_token_id=PAD)
    assert not layout.shared_prefix
    reason = "log-probs of LlamaForCausalLM in the shared-prefix layout differ from one sequence at a time by"
    assert reason in str(layout.padded_reason)
    assert model.config._attn_implementation == "sdpa"


def test_shared_prefix_is_not_used_unless_requested() -> None:
    model = make().train()
    install(model)
    assert choose_layout(model, [PAIRS], requested=False, pad_token_id=PAD) == (False, False, None)
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_layouts_agree_across_chunks() -> None:
    model = make()
    install(model)
    assert choose_layout(model, [PAIRS], requested=True, pad_token_id=PAD).shared_prefix
    torch.testing.assert_close(logps(model, shared_prefix_batch(PAIRS)), logps(model, padded_batch(PAIRS, PAD)))
