"""The objective against double-precision references written straight from the equations."""

import math
from typing import NamedTuple

import pytest
import torch
from references import naive_logp, slow_logps
from tiny import SMALL
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_plugin.model.layout import Pair, padded_batch
from spin_plugin.model.logprobs import response_logps
from spin_plugin.objective.losses import LOSSES, Objective, Scores, SpinTerms, spin_terms
from spin_plugin.objective.metrics import METRICS, SATURATED_BELOW, metric_sums

LN2 = math.log(2)
NAMES = sorted(LOSSES)


# --- the reference: one pair, on Python floats, from the equations ---------------------------------


def logistic(z: float) -> float:
    return math.log(1 + math.exp(-z))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


class PairLogps(NamedTuple):
    """Log-probs of one pair's responses, of y0 if there is one, and the real response's tokens."""

    real: float
    synthetic: float
    opponent_real: float
    opponent_synthetic: float
    initial: float | None
    tokens: int


def reference(pair: PairLogps, objective: Objective) -> float:
    """Each loss and addition straight from its equation.

    SPIN: arXiv 2401.01335, equation 4.7 with section 4.1's l; SPACE: arXiv 2512.07175 with
    sigma_mu(r) = 1 / (1 + mu e^-r); T-SPIN: arXiv 2601.08198; DPO-Positive: arXiv 2402.13228.
    """
    beta, mu = objective.beta, objective.space_mu
    real = beta * (pair.real - pair.opponent_real)
    synthetic = beta * (pair.synthetic - pair.opponent_synthetic)
    penalty = objective.real_penalty * max(0.0, -real)
    margin = real - synthetic - penalty
    if objective.loss == "space":
        loss = -math.log(1 / (1 + mu * math.exp(penalty - real)))
        loss -= mu * math.log(1 - 1 / (1 + mu * math.exp(-synthetic)))
    elif objective.loss == "t_spin":
        loss = logistic(beta * (pair.real - pair.synthetic) - penalty)
        if pair.initial is not None:
            loss += objective.t_spin_weight * logistic(beta * (pair.synthetic - pair.initial))
    else:
        loss = {
            "logistic": logistic,
            "hinge": lambda z: max(0.0, 1 - z),
            "exponential": lambda z: math.exp(-z),
            "correlation": lambda z: 1 - z,
        }[objective.loss](margin)
    return loss - objective.sft_weight * pair.real / pair.tokens


def gradient(pair: PairLogps, objective: Objective, name: str) -> float:
    """The reference's derivative with respect to one log-prob, by central differences."""
    value, step = getattr(pair, name), 1e-5
    ends = [reference(pair._replace(**{name: value + by}), objective) for by in (step, -step)]
    return (ends[0] - ends[1]) / (2 * step)


class Micro(NamedTuple):
    """A micro-batch: log-probs [R] and lengths [R] of all responses, and the indices of the pairs."""

    policy: Tensor
    opponent: Tensor
    lengths: Tensor
    sides: Tensor
    initial: Tensor | None

    def pair(self, number: int) -> PairLogps:
        real, synthetic = self.sides[:, number].tolist()
        initial = -1 if self.initial is None else self.initial[number].item()
        values, opponent = self.policy.tolist(), self.opponent.tolist()
        return PairLogps(
            values[real],
            values[synthetic],
            opponent[real],
            opponent[synthetic],
            values[initial] if initial >= 0 else None,
            int(self.lengths[real].item()),
        )

    def terms(self, objective: Objective) -> SpinTerms:
        return spin_terms(self.policy, self.opponent, self.sides, objective, lengths=self.lengths, initial=self.initial)


def random_micro(seed: int, *, grouped: bool = False) -> Micro:
    """Four pairs in fp64, some with an initial response; if `grouped`, the first two share their real response."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]] if grouped else [[0, 1, 2, 3], [4, 5, 6, 7]])
    first = int(sides.max()) + 1
    initial = [None, torch.tensor([first, -1, first + 1, -1])][seed % 2]
    responses = first + (0 if initial is None else 2)
    opponent = -20 * torch.rand(responses, generator=generator, dtype=torch.float64) - 1
    policy = opponent + 3 * torch.randn(responses, generator=generator, dtype=torch.float64)
    opponent[first:] = torch.nan  # initial responses have none
    return Micro(policy, opponent, torch.randint(1, 9, (responses,), generator=generator), sides, initial)


ADDITIONS: list[dict[str, float]] = [
    {},
    {"real_penalty": 5.0},
    {"sft_weight": 0.3},
    {"space_mu": 2.5, "t_spin_weight": 0.7, "real_penalty": 0.5, "sft_weight": 2.0},
]


def sides(pairs: int) -> Tensor:
    return torch.arange(2 * pairs).view(2, -1)


def terms_of(policy: Tensor, opponent: Tensor, objective: Objective) -> SpinTerms:
    """Call `spin_terms` with [2, B] log-probs, row 0 of real and row 1 of synthetic responses."""
    return spin_terms(policy.flatten(), opponent.flatten(), sides(policy.shape[1]), objective)


def sums_of(terms: SpinTerms, policy: Tensor, lengths: Tensor, objective: Objective) -> Tensor:
    return metric_sums(terms, policy.flatten(), lengths.flatten(), sides(policy.shape[1]), objective)


def saturated(rewards: list[list[float]], objective: Objective) -> float:
    """Return how many pairs with these [2, B] rewards are saturated."""
    policy = torch.tensor(rewards) / objective.beta
    sums = sums_of(terms_of(policy, torch.zeros_like(policy), objective), policy, torch.ones_like(policy), objective)
    return sums[list(METRICS).index("saturated")].item()


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("additions", ADDITIONS, ids=lambda additions: "-".join(additions) or "plain")
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_match_the_equations(
    name: str, grouped: bool, beta: float, additions: dict[str, float]
) -> None:
    """The gradient of a response that several pairs share is the sum of theirs."""
    objective = Objective(name, beta, **additions)
    for seed in range(4):
        micro = random_micro(seed, grouped=grouped)
        micro.policy.requires_grad_()
        terms = micro.terms(objective)
        terms.loss.sum().backward()
        expected = torch.zeros_like(micro.policy)
        for number in range(4):
            pair = micro.pair(number)
            assert terms.loss[number].item() == pytest.approx(reference(pair, objective), rel=1e-9, abs=1e-9)
            for index, side in zip(micro.sides[:, number], ("real", "synthetic"), strict=True):
                expected[index] += gradient(pair, objective, side)
            if pair.initial is not None:
                assert micro.initial is not None
                expected[micro.initial[number]] += gradient(pair, objective, "initial")
        assert micro.policy.grad is not None
        torch.testing.assert_close(micro.policy.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_additions_of_0_are_the_plain_loss_bit_for_bit(name: str) -> None:
    """Written out for the paper's losses: nothing but l of the margin."""
    micro = random_micro(1)
    micro = micro._replace(policy=micro.policy.float(), opponent=micro.opponent.float())
    terms = micro.terms(Objective(name, 0.1, real_penalty=0.0, sft_weight=0.0))
    assert torch.equal(terms.loss, LOSSES[name].value(terms.scores, Objective(name, 0.1)))
    if not LOSSES[name].reference_free:
        rewards = (0.1 * (micro.policy - micro.opponent))[micro.sides]
        assert torch.equal(torch.stack([terms.scores.real, terms.scores.synthetic]), rewards)


def test_space_at_mu_1_is_bco_pair() -> None:
    """TRL's formula, written out: its own is a branch inside a method that runs the model."""
    micro = random_micro(0)
    real, synthetic = (0.3 * (micro.policy - micro.opponent))[micro.sides]
    expected = -torch.nn.functional.logsigmoid(real) - torch.nn.functional.logsigmoid(-synthetic)
    torch.testing.assert_close(micro.terms(Objective("space", 0.3)).loss, expected)


@pytest.mark.parametrize("mu", [0.5, 1.0, 7.0])
def test_space_starts_in_the_direction_of_the_logistic_loss(mu: float) -> None:
    """At rewards of 0 its gradient is that of the logistic loss times 2 mu / (1 + mu)."""
    gradients = []
    for objective in (Objective("logistic"), Objective("space", space_mu=mu)):
        policy = torch.full((2, 1), -5.0, dtype=torch.float64, requires_grad=True)
        terms_of(policy, policy.detach(), objective).loss.sum().backward()
        assert policy.grad is not None
        gradients.append(policy.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * 2 * mu / (1 + mu))


STARTS = {
    "logistic": lambda _: LN2,
    "space": lambda mu: math.log(1 + mu) + mu * math.log(1 + 1 / mu),
    "hinge": lambda _: 1,
    "exponential": lambda _: 1,
    "correlation": lambda _: 1,
}


@pytest.mark.parametrize("mu", [1.0, 3.0])
@pytest.mark.parametrize("name", STARTS)
def test_loss_starts_at_the_value_in_the_reference(name: str, mu: float) -> None:
    policy = torch.full((2, 1), -5.0, dtype=torch.float64)
    found = terms_of(policy, policy, Objective(name, space_mu=mu, real_penalty=3.0)).loss.item()
    assert found == pytest.approx(STARTS[name](mu))


def test_t_spin_needs_no_opponent() -> None:
    micro = random_micro(1)
    expected = micro.terms(Objective("t_spin", 1.0)).loss
    found = micro._replace(opponent=micro.opponent * 3 + 1).terms(Objective("t_spin", 1.0))
    assert torch.equal(found.loss, expected)
    assert not torch.equal(found.reward_real, micro.terms(Objective("t_spin", 1.0)).reward_real)


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
        terms = terms_of(policy, opponent, Objective(name, 0.5))
        terms.loss.sum().backward()
        assert policy.grad is not None
        assert (terms.reward_real.item(), terms.reward_synthetic.item()) == (1.0, -2.0)
        assert terms.loss.item() == pytest.approx(value, abs=1e-6)
        assert policy.grad.flatten().tolist() == pytest.approx([gradient, -gradient], abs=1e-6)


def test_every_entry_is_documented() -> None:
    """The reference is generated from these fields."""
    assert all(loss.formula and loss.start and loss.source and loss.when for loss in LOSSES.values())
    assert all(metric.formula and metric.meaning for metric in METRICS.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_into_the_opponent(name: str) -> None:
    micro = random_micro(0)
    micro.opponent.requires_grad_()
    micro.policy.requires_grad_()
    micro.terms(Objective(name, real_penalty=1.0)).loss.sum().backward()
    assert micro.opponent.grad is None


SCORES = torch.linspace(-12, 12, 481, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_convex_and_decreasing_in_the_real_score(name: str) -> None:
    values = LOSSES[name].value(Scores(SCORES, torch.zeros_like(SCORES)), Objective(name))
    steps = values.diff()
    assert (steps <= 0).all()
    assert steps[0] < 0
    assert (steps.diff() >= -1e-8).all()


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_the_gradients_of_the_terms(name: str) -> None:
    """The first term's is that of the real score, the second's that of the score which only the second term has."""
    objective = Objective(name, space_mu=3.0, t_spin_weight=0.4)
    real, synthetic, initial = ((SCORES * by + 0.3).requires_grad_() for by in (1.0, 0.7, -0.4))
    scores = Scores(real, synthetic, initial if LOSSES[name].uses_initial else None)
    LOSSES[name].value(scores, objective).sum().backward()
    first, *others = LOSSES[name].slopes(scores, objective)
    assert real.grad is not None
    torch.testing.assert_close(first, -real.grad)
    own = {"space": synthetic, "t_spin": initial}
    assert len(others) == (name in own)
    for slope in others:
        torch.testing.assert_close(slope, own[name].grad)


@pytest.mark.parametrize("name", ["logistic", "space", "t_spin", "hinge", "correlation"])
def test_extreme_margins_stay_finite(name: str) -> None:
    policy = torch.tensor([[-1e5, 0.0], [0.0, -1e5]], requires_grad=True)
    terms = terms_of(policy, torch.zeros(2, 2), Objective(name, 1.0, real_penalty=2.0))
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
    objective = Objective("logistic", 0.1)
    sums = sums_of(terms_of(policy, opponent, objective), policy, lengths, objective)
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
    objective = Objective("logistic", 0.1)
    sums = sums_of(terms_of(policy, policy.clone(), objective), policy, torch.ones(2, 3), objective)
    assert sums[list(METRICS).index("accuracy")] == 0
    assert sums[list(METRICS).index("saturated")] == 0


@pytest.mark.parametrize(
    ("name", "margin"),
    [("logistic", -math.log(SATURATED_BELOW / 2)), ("exponential", -math.log(SATURATED_BELOW)), ("hinge", 1.0)],
)
def test_saturation_threshold(name: str, margin: float) -> None:
    """logistic: 1/(1 + e^z) = 0.005 at z = ln 199, close to ln 200; exponential: e^-z = 0.01; hinge: at 1."""
    assert saturated([[margin - 0.05, margin + 0.05], [0.0, 0.0]], Objective(name, 1.0)) == 1


def test_pair_is_saturated_when_both_sides_are() -> None:
    """space, mu = 1: 1 / (1 + e^z) < 0.005 above ln 199 = 5.29, on the real side for r, on the other for -r'."""
    objective = Objective("space", 1.0)
    assert saturated([[6.0, 6.0, 0.0, 6.0], [0.0, -6.0, -6.0, -5.0]], objective) == 1
    assert saturated([[0.0], [-6.0]], Objective("logistic", 1.0)) == 1  # one side's margin is enough


def test_penalty_delays_saturation_of_a_real_response_that_lost() -> None:
    """Margin 5.6 after a penalty of 1 * 0.1: slope 0.0037 < 0.005, but twice that on the real side."""
    rewards = [[-0.1], [-5.8]]
    assert saturated(rewards, Objective("logistic", 1.0)) == 1
    assert saturated(rewards, Objective("logistic", 1.0, real_penalty=1.0)) == 0


def test_t_spin_saturates_by_log_probs() -> None:
    """Pairs differ by 6 nats from real to synthetic; from synthetic to initial by 6, by 0, and the last has none."""
    policy = torch.tensor([-1.0, -1.0, -1.0, -7.0, -7.0, -7.0, -13.0, -7.0])
    pairs, initial, objective = sides(3), torch.tensor([6, 7, -1]), Objective("t_spin", 1.0)
    terms = spin_terms(policy, policy, pairs, objective, initial=initial)
    sums = metric_sums(terms, policy, torch.ones(8), pairs, objective)
    assert sums[list(METRICS).index("saturated")] == 2
    assert sums[list(METRICS).index("reward_margin")] == 0


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
