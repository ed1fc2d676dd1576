"""The shared-prefix layout: tensors worked out by hand, and the padded layout's values and gradients in real models."""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import SMALL, byte_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from spin_plugin.model import select
from spin_plugin.model.attention import enable
from spin_plugin.model.forward import install, logps
from spin_plugin.model.layout import Pair, PairCollator, padded_batch, shared_prefix_batch, single_batch
from spin_plugin.model.logprobs import response_logps
from spin_plugin.model.select import choose_layout
from spin_plugin.objective.losses import LOSSES, Objective, spin_terms

PAD = 0


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)

    def part(most: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(rng.randint(1, most))]

    return [Pair(part(9), part(14), part(14)) for _ in range(count)]


PAIRS = [*random_pairs(4), Pair([7], [8], [9])]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen3": {},
    "gemma": {},
    # eager, because SDPA does not apply Gemma 2's attention soft-capping
    "gemma2": {
        "attn_implementation": "eager",
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 3.0,
    },
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def make(architecture: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(3)
    options = SMALL | ARCHITECTURES[architecture] | changes
    attention = options.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(architecture, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    install(model)
    return model


def step(
    model: nn.Module, batch: dict[str, Tensor], *, scale: float = 1.0, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return [R] log-probs and the gradients of a training step's loss, which is scaled for the backward."""
    model.zero_grad()
    found = logps(model, batch, **options)
    loss = spin_terms(found, found.detach() + 0.1, batch["sides"], Objective(beta=0.1)).loss.sum()
    (scale * loss).backward()
    return found.detach(), {name: p.grad.float() / scale for name, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, [2, B], with every response of every pair computed on its own, equal ones too."""
    model.zero_grad()
    responses = [(pair.prompt, pair.real) for pair in pairs] + [(pair.prompt, pair.synthetic) for pair in pairs]
    found = torch.cat([logps(model, single_batch(*response), own_logits=True) for response in responses])
    sides = torch.arange(len(found)).view(2, -1)
    spin_terms(found, found.detach() + 0.1, sides, Objective(beta=0.1)).loss.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found.detach()[sides], gradients


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative difference of all gradients."""
    assert found.keys() == expected.keys()
    squares = sum((found[name] - expected[name]).square().sum() for name in expected)
    return (squares / sum(tensor.square().sum() for tensor in expected.values())).sqrt().item()


# --- the batch ---------------------------------------------------------------------------------


def test_shared_prefix_batch_by_hand() -> None:
    """Two pairs back to back; the last position of each prompt (1 and 6) predicts two tokens.

    index     0 1  2  3  4  5 | 6  7  8  9
    token     1 2 10 11 12 13 | 3 20 30 31
    position  0 1  2  3  4  2 | 0  1  1  2
    """
    batch = shared_prefix_batch([Pair([1, 2], [10, 11, 12], [13]), Pair([3], [20], [30, 31])])
    expected = {
        "input_ids": [[1, 2, 10, 11, 12, 13, 3, 20, 30, 31]],
        "position_ids": [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2]],
        "spans": [[0, 2, 2, 3], [0, 2, 5, 1], [6, 1, 7, 1], [6, 1, 8, 2]],
        "keep": [1, 2, 3, 6, 1, 6, 8],
        "targets": [10, 11, 12, 20, 13, 30, 31],
        "segments": [0, 0, 0, 1, 2, 3, 3],
        "lengths": [3, 1, 1, 2],
        "sides": [[0, 1], [2, 3]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_grouped_batches_by_hand() -> None:
    """Two pairs share prompt and real response; the third is alone.

    index     0 1  2  3  4  5  6 | 7  8  9
    token     1 2 10 11 12 13 14 | 3 20 30
    position  0 1  2  3  2  2  3 | 0  1  1
    """
    pairs = [Pair([1, 2], [10, 11], [12]), Pair([1, 2], [10, 11], [13, 14]), Pair([3], [20], [30])]
    shared, padded = shared_prefix_batch(pairs, grouped=True), padded_batch(pairs, PAD, grouped=True)
    both = {
        "targets": [10, 11, 20, 12, 13, 14, 30],
        "segments": [0, 0, 1, 2, 3, 3, 4],
        "lengths": [2, 1, 1, 2, 1],
        "sides": [[0, 0, 1], [2, 3, 4]],
    }
    expected = both | {
        "input_ids": [[1, 2, 10, 11, 12, 13, 14, 3, 20, 30]],
        "position_ids": [[0, 1, 2, 3, 2, 2, 3, 0, 1, 1]],
        "spans": [[0, 2, 2, 2], [0, 2, 4, 1], [0, 2, 5, 2], [7, 1, 8, 1], [7, 1, 9, 1]],
        "keep": [1, 2, 7, 1, 1, 5, 7],
    }
    assert {name: tensor.tolist() for name, tensor in shared.items()} == expected
    assert {name: padded[name].tolist() for name in both} == both
    assert padded["input_ids"].tolist() == [[1, 2, 10, 11], [3, 20, 0, 0], [1, 2, 12, 0], [1, 2, 13, 14], [3, 30, 0, 0]]


def test_batches_with_initial_responses_by_hand() -> None:
    """They follow the synthetic responses of their prompt; the pair without one has index -1.

    index     0 1  2  3  4  5  6  7 | 8  9 10 11
    token     1 2 10 12 13 14 15 16 | 3 20 30 31
    position  0 1  2  2  2  3  2  3 | 0  1  1  1
    """
    pairs = [Pair([1, 2], [10], [12]), Pair([1, 2], [10], [13, 14], [15, 16]), Pair([3], [20], [30], [31])]
    shared, padded = shared_prefix_batch(pairs, grouped=True), padded_batch(pairs, PAD, grouped=True)
    both = {
        "targets": [10, 20, 12, 13, 14, 30, 15, 16, 31],
        "segments": [0, 1, 2, 3, 3, 4, 5, 5, 6],
        "lengths": [1, 1, 1, 2, 1, 2, 1],
        "sides": [[0, 0, 1], [2, 3, 4]],
        "initial": [-1, 5, 6],
    }
    expected = both | {
        "input_ids": [[1, 2, 10, 12, 13, 14, 15, 16, 3, 20, 30, 31]],
        "position_ids": [[0, 1, 2, 2, 2, 3, 2, 3, 0, 1, 1, 1]],
        "spans": [[0, 2, 2, 1], [0, 2, 3, 1], [0, 2, 4, 2], [0, 2, 6, 2], [8, 1, 9, 1], [8, 1, 10, 1], [8, 1, 11, 1]],
        "keep": [1, 8, 1, 1, 4, 8, 1, 6, 8],
    }
    assert {name: tensor.tolist() for name, tensor in shared.items()} == expected
    assert {name: padded[name].tolist() for name in both} == both
    assert padded["input_ids"][-2:].tolist() == [[1, 2, 15, 16], [3, 31, 0, 0]]
    assert shared_prefix_batch(pairs)["initial"].tolist() == [-1, 6, 7]


def test_collator_reads_initial_responses() -> None:
    """They have no stored log-prob; the others keep theirs."""
    rows = [{"prompt": [1], "real": [10], "synthetic": [13], "initial": [14, 15], "index": 7}]
    batch = PairCollator(byte_tokenizer())(rows)
    assert batch["initial"].tolist() == [2]
    assert batch["lengths"].tolist() == [1, 1, 2]
    assert batch["responses"][:2].tolist() == [14, 15]
    assert "initial" not in PairCollator(byte_tokenizer())([rows[0] | {"initial": []}])


def test_pairs_of_different_prompts_are_never_grouped() -> None:
    """Only neighbors with the same prompt and real response are; then nothing differs from separate pairs."""
    pairs = [Pair([1], [10], [13]), Pair([1], [11], [13]), Pair([2], [10], [13]), Pair([1], [10], [14])]
    for build in (shared_prefix_batch, partial(padded_batch, pad_token_id=PAD)):
        apart, together = build(pairs), build(pairs, grouped=True)
        assert apart.keys() == together.keys()
        assert all(torch.equal(tensor, together[name]) for name, tensor in apart.items())


@pytest.mark.parametrize("seed", range(5))
def test_layouts_contain_the_same_predictions(seed: int) -> None:
    """Also compare the context of each kept position: all tokens before the target, in order."""
    pairs = random_pairs(6, seed)
    padded, shared = padded_batch(pairs, PAD), shared_prefix_batch(pairs)

    def predictions(batch: dict[str, Tensor], contexts: list[list[int]]) -> Counter[Any]:
        kept = [tuple(contexts[place]) for place in batch["keep"].tolist()]
        return Counter(zip(batch["segments"].tolist(), batch["targets"].tolist(), kept, strict=True))

    rows = padded["input_ids"].tolist()
    padded_contexts = [row[: place + 1] for row in rows for place in range(len(row))]
    shared_contexts = [
        [*pair.prompt, *response][: place + 1]
        for pair in pairs
        for response, first in ((pair.real, 0), (pair.synthetic, len(pair.prompt)))
        for place in range(first, len(pair.prompt) + len(response))
    ]
    assert predictions(shared, shared_contexts) == predictions(padded, padded_contexts)
    assert torch.equal(shared["lengths"], padded["lengths"])
    assert [len(context) - 1 for context in shared_contexts] == shared["position_ids"][0].tolist()


def test_collator_builds_the_shared_prefix_layout_when_set() -> None:
    collator = PairCollator(byte_tokenizer())
    collator.shared_prefix = True
    batch = collator([{"prompt": [1, 2], "real": [10, 11], "synthetic": [13], "index": 7}])
    expected = shared_prefix_batch([Pair([1, 2], [10, 11], [13])])
    assert batch.keys() == {*expected, "responses", "pairs"}
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())


# --- both layouts in real models -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefix_equals_padded(architecture: str) -> None:
    """Both equal the unmodified model's own logits in the padded layout."""
    model = make(architecture)
    expected, gradients = step(model, padded_batch(PAIRS, PAD), own_logits=True)
    layout = choose_layout(model, [PAIRS], requested=True, pad_token_id=PAD)
    assert layout == (True, False, None)
    for batch in (shared_prefix_batch(PAIRS), padded_batch(PAIRS, PAD)):
        if architecture == "gemma2" and "spans" not in batch:
            continue  # `enable` switches the padded layout to SDPA, without soft-capping
        found, found_gradients = step(model, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert distance(found_gradients, gradients) < 1e-5


def group(synthetic: int, seed: int = 0) -> list[Pair]:
    """Return pairs of one prompt; their responses have one token, equal lengths, or very different ones."""
    rng = random.Random(seed)
    prompt, real = ([rng.randrange(3, 250) for _ in range(length)] for length in (5, 7))
    lengths = [1, 7, 30, 2, 7][:synthetic]
    return [Pair(prompt, real, [rng.randrange(3, 250) for _ in range(length)]) for length in lengths]


@pytest.mark.parametrize("synthetic", [1, 2, 5])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma", "gemma2", "phi", "mixtral"])
def test_grouped_rows_equal_separate_pairs(architecture: str, synthetic: int) -> None:
    """In values and gradients, also with a prompt of one token and a real response equal to a synthetic one."""
    pairs = [*group(synthetic), *PAIRS, Pair([7], [8, 9], [8, 9]), Pair([7], [8, 9], [4])]
    model = make(architecture)
    expected, gradients = alone(model, pairs)
    assert choose_layout(model, [pairs], requested=True, pad_token_id=PAD, grouped=True) == (True, False, None)
    for build in (shared_prefix_batch, partial(padded_batch, pad_token_id=PAD)):
        batch = build(pairs, grouped=True)
        if architecture == "gemma2" and "spans" not in batch:
            continue  # `enable` switches the padded layout to SDPA, without soft-capping
        assert len(batch["lengths"]) == 2 * len(pairs) - synthetic - 1
        found, found_gradients = step(model, batch)
        torch.testing.assert_close(found[batch["sides"]], expected, rtol=1e-5, atol=1e-5)
        assert distance(found_gradients, gradients) < 1e-5


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shared_prefix", [False, True])
def test_equal_responses_are_computed_once_and_have_no_gradient(shared_prefix: bool, grouped: bool) -> None:
    """Not even that of rounding: exactly 0 in bf16."""
    pairs = [Pair([5, 6], [8, 9, 10], [8, 9, 10])] * 2 + [Pair([7], [11], [11])]
    model = make().to(torch.bfloat16)
    enable(model)
    batch = shared_prefix_batch(pairs, grouped=grouped) if shared_prefix else padded_batch(pairs, PAD, grouped=grouped)
    assert len(batch["lengths"]) == (2 if grouped else 3)
    assert batch["sides"][0].tolist() == batch["sides"][1].tolist() == ([0, 0, 1] if grouped else [0, 1, 2])
    found, gradients = step(model, batch)
    assert found.isfinite().all()
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


def test_an_initial_response_comes_after_the_synthetic_ones_that_differ() -> None:
    pairs = [Pair([1], [2, 3], [2, 3], [4]), Pair([1], [2, 3], [5])]
    for batch in (shared_prefix_batch(pairs, grouped=True), padded_batch(pairs, PAD, grouped=True)):
        assert batch["sides"].tolist() == [[0, 0], [0, 1]]
        assert batch["initial"].tolist() == [2, -1]
        assert batch["lengths"].tolist() == [2, 1, 1]
        assert batch["targets"].tolist() == [2, 3, 5, 4]


OBJECTIVES = [Objective(name, 0.1, t_spin_weight=0.6) for name in LOSSES] + [
    Objective("logistic", 0.1, real_penalty=3.0, sft_weight=0.5),
    Objective("t_spin", 0.1, real_penalty=3.0, sft_weight=0.5),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: f"{objective.loss}-{objective.sft_weight:g}")
def test_every_loss_is_the_same_in_all_layouts(objective: Objective) -> None:
    """In values and gradients of each pair's own padded sequences, with and without initial responses."""
    first, second, third = group(3)
    initial = [first._replace(initial=[9, 8, 7]), second, third._replace(initial=[5])]
    pairs = [*initial, PAIRS[0]._replace(initial=[21, 22]), *PAIRS[1:]] if LOSSES[objective.loss].uses_initial else [
        first, second, third, *PAIRS
    ]  # fmt: skip
    model = make()

    def gradients(batches: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Against an opponent that depends only on the response's length, so that all layouts have the same one."""
        model.zero_grad()
        losses = []
        for batch in batches:
            lengths = batch["lengths"]
            found = logps(model, batch)
            opponent, initial = -4.0 * lengths, batch.get("initial")
            terms = spin_terms(found, opponent, batch["sides"], objective, lengths=lengths, initial=initial)
            terms.loss.sum().backward()
            losses.append(terms.loss.detach())
        return torch.cat(losses), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = gradients([padded_batch([pair], PAD) for pair in pairs])
    enable(model)
    for grouped in (False, True):
        for batch in (shared_prefix_batch(pairs, grouped=grouped), padded_batch(pairs, PAD, grouped=grouped)):
            found, found_gradients = gradients([batch])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert distance(found_gradients, expected_gradients) < 1e-4


def test_initial_responses_are_seen_by_no_other() -> None:
    model = make()
    enable(model)
    first, second = (pair._replace(initial=[30, 31, 32]) for pair in group(2))
    with torch.no_grad():
        before = logps(model, shared_prefix_batch([first, second], grouped=True))
        changed = [first._replace(initial=[40, 41, 42]), second]
        after = logps(model, shared_prefix_batch(changed, grouped=True))
    assert ((after - before).abs() > 1e-6).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("grouped", [False, True])
def test_layout_is_chosen_with_initial_responses(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that only they suffer is noticed: here they are positioned as if they followed the real response."""
    pairs = [pair._replace(initial=[30 + number, 31, 32]) for number, pair in enumerate(group(3))]
    choose = partial(choose_layout, requested=True, pad_token_id=PAD, grouped=grouped)
    assert choose(make(), [pairs]) == (True, False, None)

    def displaced(pairs: Any, *, grouped: bool) -> dict[str, Tensor]:
        batch = shared_prefix_batch(pairs, grouped=grouped)
        batch["position_ids"][0, -3:] += 7
        return batch

    monkeypatch.setattr(select, "shared_prefix_batch", displaced)
    assert "differ from one sequence at a time" in str(choose(make(), [pairs]).padded_reason)


def test_synthetic_responses_of_a_prompt_do_not_see_each_other() -> None:
    model = make()
    enable(model)
    pairs = group(5)
    with torch.no_grad():
        before = logps(model, shared_prefix_batch(pairs, grouped=True))
        for changed, pair in enumerate(pairs):
            others = [*pairs[:changed], pair._replace(synthetic=[5] * len(pair.synthetic)), *pairs[changed + 1 :]]
            after = logps(model, shared_prefix_batch(others, grouped=True))
            differs = (after - before).abs() > 1e-6
            assert differs.tolist() == [number == 1 + changed for number in range(6)]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_own_logits_in_the_shared_prefix_layout(architecture: str) -> None:
    """Models with an unsupported head use them."""
    model = make(architecture)
    enable(model)
    expected, gradients = step(model, padded_batch(PAIRS, PAD))
    found, found_gradients = step(model, shared_prefix_batch(PAIRS), own_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert distance(found_gradients, gradients) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_nothing(architecture: str, reentrant: bool) -> None:
    model = make(architecture).train()
    enable(model)
    expected, gradients = step(model, shared_prefix_batch(PAIRS))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found, found_gradients = step(model, shared_prefix_batch(PAIRS))
    torch.testing.assert_close(found, expected)
    assert distance(found_gradients, gradients) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_lora(targets: list[str], tied: bool) -> None:
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=tied)).float()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    install(model)
    expected, gradients = step(model, padded_batch(PAIRS, PAD), own_logits=True)
    assert choose_layout(model, [PAIRS], requested=True, pad_token_id=PAD) == (True, False, None)
    found, found_gradients = step(model, shared_prefix_batch(PAIRS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert distance(found_gradients, gradients) < 1e-5
    assert all("lora" in name for name in gradients)


def test_tied_embeddings() -> None:
    model = make("llama", tie_word_embeddings=True)
    expected, gradients = step(model, padded_batch(PAIRS, PAD), own_logits=True)
    enable(model)
    found, found_gradients = step(model, shared_prefix_batch(PAIRS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert distance(found_gradients, gradients) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_bf16_error_is_bounded_by_that_of_full_logits(architecture: str) -> None:
    """The reference is fp32 arithmetic on the same bf16 weights, the bound 1.5 times the padded layout's error."""
    low = make(architecture).bfloat16()
    exact = copy.deepcopy(low).float()
    batch = padded_batch(PAIRS, PAD)
    truth, true_gradients = step(exact, batch, own_logits=True)
    naive, naive_gradients = step(low, batch, own_logits=True)
    enable(low)
    found, found_gradients = step(low, shared_prefix_batch(PAIRS))
    assert found.dtype == torch.float32
    assert (found - truth).square().mean().sqrt() <= 1.5 * (naive - truth).square().mean().sqrt() + 1e-3
    assert distance(found_gradients, true_gradients) <= 1.5 * distance(naive_gradients, true_gradients)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_autocast_returns_accurate_fp32_logps(dtype: torch.dtype, scale: float) -> None:
    """With fp16 the loss is scaled like by a GradScaler, because small gradients would underflow."""
    model = make()
    enable(model)
    expected, gradients = step(model, shared_prefix_batch(PAIRS))
    with torch.autocast("cpu", dtype):
        found, found_gradients = step(model, shared_prefix_batch(PAIRS), scale=scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert distance(found_gradients, gradients) < 0.05


def test_corrupting_one_pair_does_not_change_the_others() -> None:
    model = make()
    enable(model)
    with torch.no_grad():
        before = logps(model, shared_prefix_batch(PAIRS)).view(2, -1)
        for corrupt, pair in enumerate(PAIRS):
            changed = list(PAIRS)
            changed[corrupt] = Pair(*([token % 200 + 5 for token in part] for part in pair))
            after = logps(model, shared_prefix_batch(changed)).view(2, -1)
            others = [number for number in range(len(PAIRS)) if number != corrupt]
            torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-6)
            assert (after[:, corrupt] - before[:, corrupt]).abs().max() > 1e-3


def test_responses_do_not_see_each_other() -> None:
    model = make()
    enable(model)
    with torch.no_grad():
        before = logps(model, shared_prefix_batch(PAIRS))
        real = logps(model, shared_prefix_batch([pair._replace(synthetic=[5] * len(pair.synthetic)) for pair in PAIRS]))
        synthetic = logps(model, shared_prefix_batch([pair._replace(real=[5] * len(pair.real)) for pair in PAIRS]))
    torch.testing.assert_close(real[: len(PAIRS)], before[: len(PAIRS)], rtol=0, atol=1e-6)
    torch.testing.assert_close(synthetic[len(PAIRS) :], before[len(PAIRS) :], rtol=0, atol=1e-6)


def test_own_logits_equal_the_plain_formula() -> None:
    """`own_logits` is the reference in this file."""
    model = make()
    batch = padded_batch(PAIRS, PAD)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    expected = response_logps(logits[batch["keep"]], batch["targets"], batch["segments"], 2 * len(PAIRS))
    assert torch.equal(logps(model, batch, own_logits=True), expected)
