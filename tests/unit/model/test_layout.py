"""The padded layout: tensors worked out by hand, and padding that affects neither values nor gradients."""

from dataclasses import dataclass

import pytest
import torch
from tiny import SMALL, byte_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_plugin.model.layout import Pair, PairCollator, padded_batch
from spin_plugin.model.logprobs import response_logps
from spin_plugin.objective.losses import Objective, spin_terms

PAD = 99


def test_padded_batch_by_hand() -> None:
    """Two pairs; the longest sequence is `3 | 30 31 32 33`, so every row is 5 wide.

    row 0  1 2 | 10 11 12      positions 1, 2, 3 predict 10, 11, 12   keep  1  2  3
    row 1  3 | 20              position 0 predicts 20                 keep  5
    row 2  1 2 | 13            position 1 predicts 13                 keep 11
    row 3  3 | 30 31 32 33     positions 0..3                         keep 15 16 17 18
    """
    batch = padded_batch([Pair([1, 2], [10, 11, 12], [13]), Pair([3], [20], [30, 31, 32, 33])], PAD)
    expected = {
        "input_ids": [[1, 2, 10, 11, 12], [3, 20, PAD, PAD, PAD], [1, 2, 13, PAD, PAD], [3, 30, 31, 32, 33]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "keep": [1, 2, 3, 5, 11, 15, 16, 17, 18],
        "targets": [10, 11, 12, 20, 13, 30, 31, 32, 33],
        "segments": [0, 0, 0, 1, 2, 3, 3, 3, 3],
        "lengths": [3, 1, 1, 4],
        "sides": [[0, 1], [2, 3]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_every_kept_position_directly_precedes_its_target() -> None:
    pairs = [Pair([1] * n, list(range(10, 10 + n)), list(range(30, 33 + n))) for n in (1, 4, 2)]
    batch = padded_batch(pairs, PAD)
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["keep"] + 1], batch["targets"])
    assert torch.equal(batch["segments"].bincount(), batch["lengths"])
    assert torch.equal(batch["keep"] // batch["input_ids"].shape[1], batch["segments"])


# --- padding has no effect ---------------------------------------------------------------------

PAIRS = [Pair([5, 6, 7], [8, 9, 1], [10, 1]), Pair([11], [1], [12, 13, 14, 15, 16, 1])]
ONLY_PADDING = 200
CORRUPTION = 201


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A model without a pad token, because torch zeroes the gradient of `padding_idx`."""
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"pad_token_id": None}))).eval()


@dataclass(frozen=True)
class Step:
    """The values and gradients of a training step."""

    logps: Tensor
    logits_gradient: Tensor
    gradients: dict[str, Tensor]


def step(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Step:
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits.retain_grad()
    logps = response_logps(logits.flatten(0, 1)[batch["keep"]], batch["targets"], batch["segments"], 4)
    spin_terms(logps, torch.zeros_like(logps), batch["sides"], Objective("correlation", 0.1)).loss.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(logps.detach(), logits.grad.clone(), gradients)


def test_token_used_only_as_padding_has_no_gradient(model: LlamaForCausalLM) -> None:
    done = step(model, padded_batch(PAIRS, ONLY_PADDING))
    gradient = done.gradients["model.embed_tokens.weight"]
    assert gradient[ONLY_PADDING].eq(0).all()
    assert gradient[11].ne(0).any()


def test_positions_that_predict_no_response_token_have_no_gradient(model: LlamaForCausalLM) -> None:
    batch = padded_batch(PAIRS, ONLY_PADDING)
    flat = step(model, batch).logits_gradient.flatten(0, 1)
    outside = torch.ones(len(flat), dtype=torch.bool)
    outside[batch["keep"]] = False
    assert flat[outside].eq(0).all()
    assert flat[batch["keep"]].ne(0).any(-1).all()


def test_corrupted_padding_changes_nothing(model: LlamaForCausalLM) -> None:
    clean = padded_batch(PAIRS, ONLY_PADDING)
    corrupt = clean | {"input_ids": clean["input_ids"].where(clean["attention_mask"].bool(), CORRUPTION)}
    assert not torch.equal(clean["input_ids"], corrupt["input_ids"])
    before, after = step(model, clean), step(model, corrupt)
    assert torch.equal(before.logps, after.logps)
    assert after.gradients["model.embed_tokens.weight"][CORRUPTION].eq(0).all()
    for name, gradient in before.gradients.items():
        assert torch.equal(gradient, after.gradients[name]), name


def test_corrupted_logits_at_other_positions_change_nothing(model: LlamaForCausalLM) -> None:
    batch = padded_batch(PAIRS, ONLY_PADDING)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    corrupt = torch.full_like(logits, float("nan"))
    corrupt[batch["keep"]] = logits[batch["keep"]]
    corrupt.requires_grad_()
    found = response_logps(corrupt[batch["keep"]], batch["targets"], batch["segments"], 4)
    found.sum().backward()
    assert torch.equal(found.detach(), response_logps(logits[batch["keep"]], batch["targets"], batch["segments"], 4))
    assert corrupt.grad is not None
    assert corrupt.grad.isfinite().all()


def test_pair_does_not_depend_on_the_other_pairs(model: LlamaForCausalLM) -> None:
    together = step(model, padded_batch(PAIRS, ONLY_PADDING)).logps
    for number, pair in enumerate(PAIRS):
        batch = padded_batch([pair], ONLY_PADDING)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        alone = response_logps(logits[batch["keep"]], batch["targets"], batch["segments"], 2)
        torch.testing.assert_close(alone, together[[number, number + len(PAIRS)]], rtol=1e-5, atol=1e-5)


# --- the collator ------------------------------------------------------------------------------

ROWS = [
    {"prompt": [1, 2], "real": [10, 11], "synthetic": [13], "index": 7, "example": 3, "iteration": 1, "length": 5},
    {"prompt": [3], "real": [20], "synthetic": [21, 22, 23], "index": 0, "example": 0, "iteration": 0, "length": 5},
]


def test_collator_pads_with_the_pad_token() -> None:
    tokenizer = byte_tokenizer()
    batch = PairCollator(tokenizer)(ROWS)
    expected = padded_batch([Pair([1, 2], [10, 11], [13]), Pair([3], [20], [21, 22, 23])], tokenizer.pad_token_id)
    assert batch.keys() == {*expected, "responses", "pairs"}
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
    assert batch["responses"].tolist() == [14, 0, 15, 1]
    assert batch["pairs"].tolist() == [7, 0]


def test_collator_pads_with_eos_without_a_pad_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    batch = PairCollator(tokenizer, pad_to_multiple_of=64)(ROWS)
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(padding) > 0
    assert padding.eq(tokenizer.eos_token_id).all()


def test_pad_token_id_0_is_valid() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    assert PairCollator(tokenizer).pad_token_id == 0
