"""Whether vLLM drew from the policy: which responses are compared, how far apart they are, and what comes of it."""

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
from spin_plugin.model.layout import Pair, by_token, padded_batch, shared_prefix_batch
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
    drawn: Response = {"split": split, "example": example, "tokens": tokens, "finish": "stop", "stop": END}
    return drawn | ({"logps": [-0.1 * token for token in tokens]} if scored else {})


def pairs_of(directory: Path, drawn: list[Response], *, keep_equal: bool, earlier: int = 0) -> Dataset:
    """The pairs of iteration 1, as an iteration builds them; the real response of example n is [n, END]."""
    examples = max(each["example"] for each in drawn) + 1
    with table_writer(directory / "real.arrow", EXAMPLE_SCHEMA) as write:
        write({"prompt": examples * [[7]], "real": [[number, END] for number in range(examples)]})
    of_train = [each for each in drawn if each["split"] == "train"]
    synthetic = [Synthetic(each["example"], 1, each["tokens"], truncated=False) for each in of_train]
    mixed = [each._replace(iteration=0) for each in synthetic[:earlier]] + synthetic
    options = {"end_tokens": [END], "sequence_len": 50, "keep_equal": keep_equal}
    build_pairs(open_table(directory / "real.arrow"), mixed, directory / "train.arrow", **options)
    return open_table(directory / "train.arrow")


def test_scored_responses_are_found_among_those_that_became_pairs(tmp_path: Path) -> None:
    """Equal and empty ones did not, held-out ones stand in front, an earlier iteration's look the same, and vLLM may
    have left one without a value: seven and more of every ten are left, not none."""
    drawn = [response(number, [50, END], split="eval") for number in range(100)]
    for number in range(200):
        kinds = {0: [number, END], 1: [END]}  # equal to the real one, empty
        drawn.append(response(number, kinds.get(number % 10, [30, number + 1, END]), scored=number % 10 != 2))
    pairs = pairs_of(tmp_path, drawn, keep_equal=False, earlier=50)
    found = comparable(drawn, pairs, 1)
    assert len(found.pairs) == len(found.drawn) == 47  # 140, every third of them
    assert {pair["iteration"] for pair in found.pairs} == {1}
    assert not {pair["example"] % 10 for pair in found.pairs} & {0, 1, 2}
    for pair, values in zip(found.pairs, found.drawn, strict=True):
        assert values == [-0.1 * token for token in pair["synthetic"]]
        assert pairs[pair["index"]] == pair


def test_no_more_are_compared_than_needed(tmp_path: Path) -> None:
    drawn = [response(number, [30, number + 1, END]) for number in range(SCORED)]
    found = comparable(drawn, pairs_of(tmp_path, drawn, keep_equal=True), 1)
    assert len(found.pairs) == COMPARED
    assert found.pairs[-1]["example"] > SCORED * 0.9, "they are spread over all that were scored"


def test_nothing_is_compared_where_every_scored_response_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = [response(number, [number, END]) for number in range(SCORED)]
    drawn += [response(number, [30, END], scored=False) for number in range(5)]
    pairs = pairs_of(tmp_path, drawn, keep_equal=False)
    assert len(pairs) == 5
    found = comparable(drawn, pairs, 1)
    assert found == ([], [])
    require_agreement(distance(found.drawn, []), 1, exact=True, quantised=False)
    assert capsys.readouterr().out.startswith("spin: warning: iteration 1: whether vLLM drew from the model that ")


def slow_distance(drawn: list[list[float]], policy: list[list[float]]) -> tuple[float, float, float]:
    apart = [q - p for given, values in zip(drawn, policy, strict=True) for p, q in zip(given, values, strict=False)]
    kl = sum(math.exp(delta) - 1 - delta for delta in apart) / len(apart)
    return sum(map(abs, apart)) / len(apart), max(map(abs, apart)), kl


def test_distance_is_by_token() -> None:
    """Worked by hand: Δ = ln 2 and -ln 2 cancel in the sum of a response, and not in the mean; as a KL they are
    (2 - 1 - ln 2) and (1/2 - 1 + ln 2), together 1/2."""
    found = distance([[-1.0, -2.0]], [torch.tensor([-1.0 + math.log(2), -2.0 - math.log(2)])])
    assert found is not None
    assert found == pytest.approx((math.log(2), math.log(2), 0.25, 2, 1), rel=1e-6)


def test_distance_is_what_a_loop_finds_and_ends_with_what_vllm_gave() -> None:
    torch.manual_seed(0)
    policy = [-torch.rand(length) for length in (1, 7, 30)]
    drawn = [(values + 0.01 * torch.randn(len(values))).tolist() for values in policy]
    drawn[2] = drawn[2][:20]
    found = distance(drawn, policy)
    assert found is not None
    assert found[:3] == pytest.approx(slow_distance(drawn, [values.tolist() for values in policy]), rel=1e-5)
    assert found[3:] == (28, 3)


@pytest.mark.parametrize(
    ("mean", "exact", "quantised", "comes"),
    [
        (EXACT / 2, True, False, "said"),
        (EXACT * 2, True, False, "refused"),
        (EXACT * 2, False, False, "said"),
        (SUSPECT * 1.1, False, False, "warned of"),
        (ROUNDED * 1.1, False, False, "refused"),
        (ROUNDED * 1.1, False, True, "said"),
        (math.nan, False, False, "refused"),
        (math.nan, True, False, "refused"),
    ],
)
def test_what_rounding_does_not_explain_is_refused(
    mean: float, exact: bool, quantised: bool, comes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Distance(mean, mean, mean, 9, 1)
    if comes == "refused":
        with pytest.raises(SpinError, match="drawn from another model"):
            require_agreement(found, 0, exact=exact, quantised=quantised)
        return
    require_agreement(found, 0, exact=exact, quantised=quantised)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("spin: warning: " if comes == "warned of" else "spin: iteration 0: vLLM and the policy are ")


# --- the policy's side ---------------------------------------------------------------------------

PAIRS = [
    Pair([5, 6, 7], [8, 9, 258], [10, 258]),
    Pair([11], [258], [12, 13, 14, 15, 258]),
    Pair([20, 21, 22, 23, 24], [25, 26], [27, 28, 29]),
]


def in_a_loop(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> list[float]:
    return [naive_logp(model, [*prompt, *tokens[:place]], [token]) for place, token in enumerate(tokens)]


@torch.no_grad()
@pytest.mark.parametrize("own_logits", [False, True])
def test_tokens_of_a_batch_are_what_a_loop_finds(own_logits: bool) -> None:
    """In the order of the batch's own responses, so that they can be told apart by its lengths."""
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    install(model)
    batch = padded_batch(PAIRS, pad_token_id=256)
    found = logps(model, by_token(batch), own_logits=own_logits)
    expected: list[float] = []
    for side in ("real", "synthetic"):
        for pair in PAIRS:
            expected += in_a_loop(model, list(pair.prompt), list(getattr(pair, side)))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    sums = torch.stack([part.sum() for part in found.split(batch["lengths"].tolist())])
    torch.testing.assert_close(sums, logps(model, batch), rtol=1e-5, atol=1e-5)


def test_tokens_of_a_flat_batch_stand_in_the_order_of_its_lengths() -> None:
    flat = shared_prefix_batch(PAIRS)
    parts: tuple[Tensor, ...] = flat["targets"].split(flat["lengths"].tolist())
    assert [part.tolist() for part in parts] == [list(p.real) for p in PAIRS] + [list(p.synthetic) for p in PAIRS]
    assert by_token(flat)["segments"].tolist() == list(range(len(flat["targets"])))
