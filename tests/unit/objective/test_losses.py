"""The objective against double-precision references written straight from the equations."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import naive_logp, slow_logps
from tiny import SMALL
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_plugin.model.layout import Pair, padded_batch
from spin_plugin.model.logprobs import response_logps
from spin_plugin.objective.losses import LOSSES, SpinTerms, spin_terms
from spin_plugin.objective.metrics import METRICS, SATURATED_BELOW, metric_sums

LN2 = math.log(2)
NAMES = sorted(LOSSES)


class Function:
    """A loss and its derivative on Python floats, from section 4.1 of the paper."""

    def __init__(self, value: Callable[[float], float], derivative: Callable[[float], float]) -> None:
        self.value, self.derivative = value, derivative


REFERENCE = {
    "logistic": Function(lambda z: math.log(1 + math.exp(-z)), lambda z: -1 / (1 + math.exp(z))),
    "hinge": Function(lambda z: max(0.0, 1 - z), lambda z: -1.0 if z < 1 else 0.0),
    "exponential": Function(lambda z: math.exp(-z), lambda z: -math.exp(-z)),
    "correlation": Function(lambda z: 1 - z, lambda z: -1.0),
}


def reference_margin(policy: list[list[float]], opponent: list[list[float]], beta: float, pair: int) -> float:
    """beta (log p_theta(y|x) - log p_t(y|x)) - beta (log p_theta(y'|x) - log p_t(y'|x)), equation 4.7."""
    real = beta * (policy[0][pair] - opponent[0][pair])
    return real - beta * (policy[1][pair] - opponent[1][pair])


def random_logps(pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return log-probs of a policy and of an opponent close to it, [2, pairs] fp64 each."""
    generator = torch.Generator().manual_seed(seed)
    opponent = -60 * torch.rand(2, pairs, generator=generator, dtype=torch.float64) - 1
    return opponent + 8 * torch.randn(2, pairs, generator=generator, dtype=torch.float64), opponent


def sides(pairs: int) -> Tensor:
    return torch.arange(2 * pairs).view(2, -1)


def terms_of(policy: Tensor, opponent: Tensor, **options: Any) -> SpinTerms:
    """Call `spin_terms` with [2, B] log-probs, row 0 of real and row 1 of synthetic responses."""
    return spin_terms(policy.flatten(), opponent.flatten(), sides(policy.shape[1]), **options)


def sums_of(terms: SpinTerms, policy: Tensor, lengths: Tensor, *, loss: str) -> Tensor:
    return metric_sums(terms, policy.flatten(), lengths.flatten(), sides(policy.shape[1]), loss=loss)


# --- the loss ----------------------------------------------------------------------------------


def test_every_loss_has_a_reference() -> None:
    assert LOSSES.keys() == REFERENCE.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_value_and_gradient_match_the_equations(name: str, beta: float) -> None:
    policy, opponent = random_logps(32)
    policy.requires_grad_()
    terms = terms_of(policy, opponent, beta=beta, loss=name)
    terms.loss.sum().backward()
    assert policy.grad is not None
    for pair in range(32):
        margin = reference_margin(policy.tolist(), opponent.tolist(), beta, pair)
        slope = beta * REFERENCE[name].derivative(margin)
        assert terms.loss[pair].item() == pytest.approx(REFERENCE[name].value(margin), rel=1e-9, abs=1e-8)
        assert policy.grad[0, pair].item() == pytest.approx(slope, rel=1e-9, abs=1e-8)
        assert policy.grad[1, pair].item() == pytest.approx(-slope, rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("name", ["logistic", "exponential", "correlation"])
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    policy, opponent = random_logps(8, seed=1)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: terms_of(p, opponent, beta=0.3, loss=name).loss, policy)


def test_hand_worked_pair() -> None:
    """One pair, beta 0.5.

    Policy -10 and -30, opponent -12 and -26: the real response gained 2, the synthetic one lost 4.
    The rewards are 0.5 * 2 = 1 and 0.5 * (-4) = -2, the margin is 3, and the losses are
    logistic ln(1 + e^-3) = 0.048587, hinge max(0, -2) = 0, exponential e^-3 = 0.049787, correlation -2.
    The gradient with respect to the real log-probability is beta * l'(3):
    logistic -0.5 / (1 + e^3) = -0.023713, hinge 0, exponential -0.5 e^-3 = -0.024894, correlation -0.5.
    """
    expected = {
        "logistic": (0.048587, -0.023713),
        "hinge": (0.0, 0.0),
        "exponential": (0.049787, -0.024894),
        "correlation": (-2.0, -0.5),
    }
    opponent = torch.tensor([[-12.0], [-26.0]])
    for name, (value, gradient) in expected.items():
        policy = torch.tensor([[-10.0], [-30.0]], requires_grad=True)
        terms = terms_of(policy, opponent, beta=0.5, loss=name)
        terms.loss.sum().backward()
        assert policy.grad is not None
        assert (terms.reward_real.item(), terms.reward_synthetic.item()) == (1.0, -2.0)
        assert terms.loss.item() == pytest.approx(value, abs=1e-6)
        assert policy.grad.flatten().tolist() == pytest.approx([gradient, -gradient], abs=1e-6)


def test_pairs_may_share_a_response() -> None:
    """With one real and two synthetic responses, the gradient is the sum of the gradients of the two pairs."""
    policy, opponent = torch.tensor([-10.0, -30.0, -7.0], requires_grad=True), torch.tensor([-12.0, -26.0, -9.0])
    shared = spin_terms(policy, opponent, torch.tensor([[0, 0], [1, 2]]), beta=0.5, loss="logistic")
    shared.loss.sum().backward()
    assert policy.grad is not None
    gradient = torch.zeros(3)
    for number, synthetic in enumerate((1, 2)):
        alone = policy.detach().clone().requires_grad_()
        terms = spin_terms(alone, opponent, torch.tensor([[0], [synthetic]]), beta=0.5, loss="logistic")
        terms.loss.sum().backward()
        assert alone.grad is not None
        gradient += alone.grad
        assert terms.loss.item() == shared.loss[number].item()
    torch.testing.assert_close(policy.grad, gradient)


def test_every_entry_is_documented() -> None:
    """The reference is generated from these fields."""
    assert all(loss.formula and loss.source and loss.when for loss in LOSSES.values())
    assert all(metric.formula and metric.meaning for metric in METRICS.values())


@pytest.mark.parametrize(("name", "value"), [("logistic", LN2), ("hinge", 1), ("exponential", 1), ("correlation", 1)])
def test_loss_at_the_first_step(name: str, value: float) -> None:
    """Before its first step the policy equals the opponent, so every margin is 0 for any beta."""
    policy, _ = random_logps(4)
    assert terms_of(policy, policy.clone(), beta=0.7, loss=name).loss.tolist() == pytest.approx([value] * 4)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_into_the_opponent(name: str) -> None:
    policy, opponent = random_logps(4)
    opponent.requires_grad_()
    terms_of(policy.requires_grad_(), opponent, beta=0.1, loss=name).loss.sum().backward()
    assert opponent.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_convex_and_decreasing(name: str) -> None:
    margins = torch.linspace(-12, 12, 481, dtype=torch.float64)
    values = LOSSES[name].value(margins)
    steps = values.diff()
    assert (steps <= 0).all()
    assert steps[0] < 0
    assert (steps.diff() >= -1e-8).all()


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_negated_derivative(name: str) -> None:
    margins = torch.tensor([-3.0, -0.5, 0.0, 0.9, 1.1, 4.0], dtype=torch.float64)
    expected = [-REFERENCE[name].derivative(margin) for margin in margins.tolist()]
    assert LOSSES[name].slope(margins).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["logistic", "hinge", "correlation"])
def test_extreme_margins_stay_finite(name: str) -> None:
    policy = torch.tensor([[-1e5, 0.0], [0.0, -1e5]], requires_grad=True)
    terms = terms_of(policy, torch.zeros(2, 2), beta=1.0, loss=name)
    terms.loss.sum().backward()
    assert policy.grad is not None
    assert terms.loss.isfinite().all()
    assert policy.grad.isfinite().all()


# --- the metrics -------------------------------------------------------------------------------


def test_metric_sums_by_hand() -> None:
    """Two pairs, beta 0.1, logistic.

    Pair 0: policy -20 real and -70 synthetic, opponent -25 and -15: rewards 0.5 and -5.5, margin 6,
    loss ln(1 + e^-6) = 0.0024757; slope 1/(1 + e^6) = 0.00247 < 0.01 * 0.5: saturated, ranked correctly.
    Pair 1: policy -8 and -3, opponent -6 and -4: rewards -0.2 and 0.1, margin -0.3,
    loss ln(1 + e^0.3) = 0.8543553; not saturated, misranked.
    Lengths 4, 2 (real) and 7, 3 (synthetic): per token -20/4 - 8/2 = -9 and -70/7 - 3/3 = -11.
    """
    policy = torch.tensor([[-20.0, -8.0], [-70.0, -3.0]], requires_grad=True)
    opponent = torch.tensor([[-25.0, -6.0], [-15.0, -4.0]])
    lengths = torch.tensor([[4, 2], [7, 3]])
    terms = terms_of(policy, opponent, beta=0.1, loss="logistic")
    sums = sums_of(terms, policy, lengths, loss="logistic")
    assert not sums.requires_grad
    assert sums.dtype == torch.float32
    assert dict(zip(METRICS, sums.tolist(), strict=True)) == pytest.approx(
        {
            "loss": 0.0024757 + 0.8543553,
            "reward_real": 0.5 - 0.2,
            "reward_synthetic": -5.5 + 0.1,
            "reward_margin": 6 - 0.3,
            "accuracy": 1,
            "saturated": 1,
            "logp_real": -28,
            "logp_synthetic": -73,
            "logp_real_per_token": -9,
            "logp_synthetic_per_token": -11,
        },
        rel=1e-5,
    )


def test_zero_margin_counts_as_a_miss() -> None:
    """Before the first step all margins are 0; an accuracy of 1 would look like a converged run."""
    policy = torch.full((2, 3), -5.0)
    terms = terms_of(policy, policy.clone(), beta=0.1, loss="logistic")
    sums = sums_of(terms, policy, torch.ones(2, 3), loss="logistic")
    assert sums[list(METRICS).index("accuracy")] == 0
    assert sums[list(METRICS).index("saturated")] == 0


@pytest.mark.parametrize(
    ("name", "margin"),
    [("logistic", -math.log(SATURATED_BELOW / 2)), ("exponential", -math.log(SATURATED_BELOW)), ("hinge", 1.0)],
)
def test_saturation_threshold(name: str, margin: float) -> None:
    """logistic: 1/(1 + e^z) = 0.005 at z = ln 199, close to ln 200; exponential: e^-z = 0.01; hinge: at 1."""
    policy = torch.tensor([[margin - 0.05, margin + 0.05], [0.0, 0.0]])
    terms = terms_of(policy, torch.zeros(2, 2), beta=1.0, loss=name)
    sums = sums_of(terms, policy, torch.ones(2, 2), loss=name)
    assert sums[list(METRICS).index("saturated")] == 1


# --- log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_response_logps_agree_with_a_plain_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(23, 17, generator=generator)).to(dtype)
    targets = torch.randint(17, (23,), generator=generator)
    segments = torch.tensor([0] * 5 + [1] * 1 + [2] * 9 + [4] * 8)  # response 3 has no token
    found = response_logps(logits, targets, segments, 5)
    assert found.dtype == torch.float32
    expected = slow_logps(logits.double().tolist(), targets.tolist(), segments.tolist(), 5)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found[3] == 0


def test_response_logps_are_a_sum_not_a_mean() -> None:
    """Uniform logits over 4 tokens: every token costs ln 4."""
    found = response_logps(torch.zeros(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 0, 0, 0, 0, 1]), 2)
    assert found.tolist() == pytest.approx([-5 * math.log(4), -math.log(4)])


def test_order_of_the_positions_does_not_matter() -> None:
    logits = torch.randn(12, 9, generator=torch.Generator().manual_seed(5))
    targets, segments = torch.arange(12) % 9, torch.arange(12) // 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    shuffled = response_logps(logits[order], targets[order], segments[order], 3)
    torch.testing.assert_close(shuffled, response_logps(logits, targets, segments, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    """With ±1e4 in one row, the likely token has log-probability 0, the unlikely one -2e4 up to input rounding."""
    logits = torch.tensor([[1e4, -1e4, -1e4], [1e4, -1e4, -1e4], [1e4, 1e4, -1e4]]).to(dtype).requires_grad_()
    found = response_logps(logits, torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]), 3)
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert found.tolist() == pytest.approx([0, -2e4, -LN2], rel=4e-3)


def test_gradient_of_response_logps_is_one_minus_probability() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    targets = torch.tensor([1, 0, 6, 3, 3])
    response_logps(logits, targets, torch.tensor([0, 0, 1, 1, 1]), 2).sum().backward()
    expected = torch.nn.functional.one_hot(targets, 7) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected.to(logits.dtype), rtol=1e-5, atol=1e-6)


# --- together with the layout ------------------------------------------------------------------

PAIRS = [
    Pair([5, 6, 7], [8, 9, 258], [10, 258]),
    Pair([11], [258], [12, 13, 14, 15, 258]),
    Pair([20, 21, 22, 23, 24], [25, 26], [27, 28, 29]),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(11)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@torch.no_grad()
def test_batch_agrees_with_a_loop_over_single_tokens(model: LlamaForCausalLM) -> None:
    """The label shift is right, the end token counts, and neither padding nor other sequences leak in."""
    batch = padded_batch(PAIRS, pad_token_id=256)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = response_logps(logits.flatten(0, 1)[batch["keep"]], batch["targets"], batch["segments"], 6).view(2, -1)
    expected = torch.tensor(
        [
            [naive_logp(model, list(pair.prompt), list(pair.real)) for pair in PAIRS],
            [naive_logp(model, list(pair.prompt), list(pair.synthetic)) for pair in PAIRS],
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_end_token_is_part_of_the_response(model: LlamaForCausalLM) -> None:
    """Its log-probability is the difference between the response with and without it."""
    complete, open_ended = [
        padded_batch([Pair([5, 6, 7], response, response)], pad_token_id=256) for response in ([8, 9, 258], [8, 9])
    ]
    sums = [
        response_logps(
            model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.flatten(0, 1)[b["keep"]],
            b["targets"],
            b["segments"],
            2,
        )[0].item()
        for b in (complete, open_ended)
    ]
    end = slow_logps([model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, -1].tolist()], [258], [0], 1)[0]
    assert end < 0
    assert sums[0] == pytest.approx(sums[1] + end, rel=1e-5)
