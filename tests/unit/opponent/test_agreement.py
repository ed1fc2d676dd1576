"""The agreement check: which responses are compared, how far apart vLLM and the policy are, and the verdict."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from references import naive_logp
from tiny import SMALL
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_plugin.console import SpinError
from spin_plugin.data.pairs import Synthetic, build_pairs
from spin_plugin.data.table import EXAMPLE_SCHEMA, open_table, table_writer
from spin_plugin.generation.job import SCORED
from spin_plugin.model.forward import install, logps
from spin_plugin.model.layout import Pair, padded_batch, shared_prefix_batch, split_into_tokens
from spin_plugin.opponent.agreement import (
    COMPARED,
    EXACT,
    ROUNDED,
    SUSPECT,
    Distance,
    comparable,
    distance,
    require_agreement,
)

END = 2
Response = dict[str, Any]


def response(example: int, tokens: list[int], *, split: str = "train", scored: bool = True) -> Response:
    generated: Response = {"split": split, "example": example, "tokens": tokens, "finish": "stop", "stop": END}
    return generated | ({"logps": [-0.1 * token for token in tokens]} if scored else {})


def build(directory: Path, responses: list[Response], *, keep_equal: bool, earlier: int = 0) -> Dataset:
    """Build the pairs of iteration 1; the real response of example n is [n, END]."""
    examples = max(each["example"] for each in responses) + 1
    with table_writer(directory / "real.arrow", EXAMPLE_SCHEMA) as write:
        numbers = [*range(examples)]
        write({"prompt": examples * [[7]], "real": [[number, END] for number in numbers], "row": numbers})
    of_train = [each for each in responses if each["split"] == "train"]
    synthetic = [Synthetic(each["example"], 1, each["tokens"], truncated=False) for each in of_train]
    mixed = [each._replace(iteration=0) for each in synthetic[:earlier]] + synthetic
    options = {"end_tokens": [END], "sequence_len": 50, "keep_equal": keep_equal}
    build_pairs(open_table(directory / "real.arrow"), mixed, directory / "train.arrow", **options)
    return open_table(directory / "train.arrow")


def test_pairs_of_scored_responses_are_found(tmp_path: Path) -> None:
    """Identical and empty responses become no pair, and some have no score: seven of every ten are left.

    Held-out responses come first, and those of an earlier iteration look the same.
    """
    responses = [response(number, [50, END], split="eval") for number in range(100)]
    for number in range(200):
        kinds = {0: [number, END], 1: [END]}  # identical to the real one, empty
        responses.append(response(number, kinds.get(number % 10, [30, number + 1, END]), scored=number % 10 != 2))
    pairs = build(tmp_path, responses, keep_equal=False, earlier=50)
    found = comparable(responses, pairs, 1)
    assert len(found.pairs) == len(found.vllm_logps) == 47  # every third of 140
    assert {pair["iteration"] for pair in found.pairs} == {1}
    assert not {pair["example"] % 10 for pair in found.pairs} & {0, 1, 2}
    for pair, values in zip(found.pairs, found.vllm_logps, strict=True):
        assert values == [-0.1 * token for token in pair["synthetic"]]
        assert pairs[pair["index"]] == pair


def test_number_of_compared_pairs_is_limited(tmp_path: Path) -> None:
    responses = [response(number, [30, number + 1, END]) for number in range(SCORED)]
    found = comparable(responses, build(tmp_path, responses, keep_equal=True), 1)
    assert len(found.pairs) == COMPARED
    assert found.pairs[-1]["example"] > SCORED * 0.9, "spread over all scored responses"


def test_warning_if_every_scored_response_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses = [response(number, [number, END]) for number in range(SCORED)]
    responses += [response(number, [30, END], scored=False) for number in range(5)]
    pairs = build(tmp_path, responses, keep_equal=False)
    assert len(pairs) == 5
    found = comparable(responses, pairs, 1)
    assert found == ([], [])
    require_agreement(distance(found.vllm_logps, []), 1, exact=True, quantized=False)
    assert capsys.readouterr().out.startswith("spin: warning: iteration 1: cannot check that vLLM generated ")


def distance_by_loop(vllm: list[list[float]], policy: list[list[float]]) -> tuple[float, float, float]:
    deltas = [q - p for given, values in zip(vllm, policy, strict=True) for p, q in zip(given, values, strict=False)]
    kl = sum(math.exp(delta) - 1 - delta for delta in deltas) / len(deltas)
    return sum(map(abs, deltas)) / len(deltas), max(map(abs, deltas)), kl


def test_distance_is_per_token() -> None:
    """By hand: Δ = ln 2 and -ln 2 cancel in a response's sum but not in the mean of |Δ|; their KL terms are
    2 - 1 - ln 2 and 1/2 - 1 + ln 2, 1/2 in total."""
    found = distance([[-1.0, -2.0]], [torch.tensor([-1.0 + math.log(2), -2.0 - math.log(2)])])
    assert found is not None
    assert found == pytest.approx((math.log(2), math.log(2), 0.25, 2, 1), rel=1e-6)


def test_distance_matches_a_loop_and_ends_at_the_last_scored_token() -> None:
    torch.manual_seed(0)
    policy = [-torch.rand(length) for length in (1, 7, 30)]
    vllm = [(values + 0.01 * torch.randn(len(values))).tolist() for values in policy]
    vllm[2] = vllm[2][:20]
    found = distance(vllm, policy)
    assert found is not None
    assert found[:3] == pytest.approx(distance_by_loop(vllm, [values.tolist() for values in policy]), rel=1e-5)
    assert found[3:] == (28, 3)


@pytest.mark.parametrize(
    ("mean", "exact", "quantized", "outcome"),
    [
        (EXACT / 2, True, False, "reported"),
        (EXACT * 2, True, False, "refused"),
        (EXACT * 2, False, False, "reported"),
        (SUSPECT * 1.1, False, False, "warning"),
        (ROUNDED * 1.1, False, False, "refused"),
        (ROUNDED * 1.1, False, True, "reported"),
        (math.nan, False, False, "refused"),
        (math.nan, True, False, "refused"),
    ],
)
def test_distance_beyond_rounding_is_refused(
    mean: float, exact: bool, quantized: bool, outcome: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Distance(mean, mean, mean, 9, 1)
    if outcome == "refused":
        with pytest.raises(SpinError, match="generated by another model"):
            require_agreement(found, 0, exact=exact, quantized=quantized)
        return
    require_agreement(found, 0, exact=exact, quantized=quantized)
    (line,) = capsys.readouterr().out.splitlines()
    kind = "warning" if outcome == "warning" else "note"
    assert line.startswith(f"spin: {kind}: iteration 0: vLLM and the policy are ")


# --- the policy's side ---------------------------------------------------------------------------

PAIRS = [
    Pair([5, 6, 7], [8, 9, 258], [10, 258]),
    Pair([11], [258], [12, 13, 14, 15, 258]),
    Pair([20, 21, 22, 23, 24], [25, 26], [27, 28, 29]),
]


def logps_by_loop(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> list[float]:
    return [naive_logp(model, [*prompt, *tokens[:place]], [token]) for place, token in enumerate(tokens)]


@torch.no_grad()
@pytest.mark.parametrize("own_logits", [False, True])
def test_token_logps_of_a_batch_match_a_loop(own_logits: bool) -> None:
    """In the order of the batch's responses, so that its lengths split them."""
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    install(model)
    batch = padded_batch(PAIRS, pad_token_id=256)
    found = logps(model, split_into_tokens(batch), own_logits=own_logits)
    expected: list[float] = []
    for side in ("real", "synthetic"):
        for pair in PAIRS:
            expected += logps_by_loop(model, list(pair.prompt), list(getattr(pair, side)))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    sums = torch.stack([part.sum() for part in found.split(batch["lengths"].tolist())])
    torch.testing.assert_close(sums, logps(model, batch), rtol=1e-5, atol=1e-5)


def test_tokens_of_a_shared_prefix_batch_are_in_the_order_of_its_lengths() -> None:
    batch = shared_prefix_batch(PAIRS)
    parts: tuple[Tensor, ...] = batch["targets"].split(batch["lengths"].tolist())
    assert [part.tolist() for part in parts] == [list(p.real) for p in PAIRS] + [list(p.synthetic) for p in PAIRS]
    assert split_into_tokens(batch)["segments"].tolist() == list(range(len(batch["targets"])))
