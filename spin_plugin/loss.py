"""The SPIN objective: log-probabilities and plain numbers in, losses and metrics out.

SPIN (arXiv 2401.01335, equation 4.7), with r = log p_theta(y|x) - log p_t(y|x) for the real response y
and r' the same for the synthetic response y' ~ p_t(.|x):

    L(theta) = E[ l( beta * r - beta * r' ) ]

where l is convex and decreasing, theta is the main player and p_t the opponent.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

# A pair is past saturation when it pulls with less than this share of the force it has at margin 0.
SATURATED_BELOW = 0.01


class LossFunction(NamedTuple):
    """A convex decreasing function of the reward margin and the size of its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


LOSSES: dict[str, LossFunction] = {
    # log(1 + e^-z); l(0) = ln 2, l'(0) = -1/2
    "logistic": LossFunction(lambda z: softplus(-z), lambda z: torch.sigmoid(-z)),
    # max(0, 1 - z); the slope is 0 past the margin 1
    "hinge": LossFunction(lambda z: relu(1 - z), lambda z: (z < 1).to(z.dtype)),
    # e^-z
    "exponential": LossFunction(lambda z: torch.exp(-z), lambda z: torch.exp(-z)),
    # 1 - z, the integral probability metric of section 4.1: linear, so it never saturates
    "correlation": LossFunction(lambda z: 1 - z, torch.ones_like),
}


class SpinTerms(NamedTuple):
    """One micro-batch of B pairs, every field of shape [B], fp32."""

    loss: Tensor
    reward_real: Tensor
    reward_synthetic: Tensor


def spin_terms(policy: Tensor, opponent: Tensor, *, beta: float, loss: str) -> SpinTerms:
    """Loss and rewards of each pair.

    Args:
        policy: [2, B] summed log-probabilities of the main player, row 0 real and row 1 synthetic responses.
        opponent: [2, B] the same of the opponent; no gradient flows into it.
        beta: the paper's lambda.
        loss: a key of `LOSSES`.
    """
    reward_real, reward_synthetic = beta * (policy - opponent.detach())
    return SpinTerms(LOSSES[loss].value(reward_real - reward_synthetic), reward_real, reward_synthetic)


METRICS = (
    "loss",
    "reward_real",
    "reward_synthetic",
    "reward_margin",
    "accuracy",
    "saturated",
    "logp_real",
    "logp_synthetic",
    "logp_real_per_token",
    "logp_synthetic_per_token",
)


def metric_sums(terms: SpinTerms, policy: Tensor, lengths: Tensor, *, loss: str) -> Tensor:
    """Sums over the pairs of the micro-batch, to be divided by the number of pairs when they are logged.

    Args:
        terms: what `spin_terms` gave.
        policy: [2, B] summed log-probabilities of the main player.
        lengths: [2, B] response lengths in tokens.
        loss: a key of `LOSSES`.

    Returns:
        [len(METRICS)] detached, in the order of `METRICS`; no host synchronisation happens.
    """
    margin = (terms.reward_real - terms.reward_synthetic).detach()
    slope = LOSSES[loss].slope
    saturated = slope(margin) < SATURATED_BELOW * slope(torch.zeros_like(margin))
    per_token = policy / lengths
    columns = [
        terms.loss,
        terms.reward_real,
        terms.reward_synthetic,
        margin,
        margin > 0,
        saturated,
        *policy,
        *per_token,
    ]
    return torch.stack([column.detach().float().sum() for column in columns])


def response_logps(logits: Tensor, targets: Tensor, segments: Tensor, responses: int) -> Tensor:
    """Sum the log-probabilities of response tokens, per response, in fp32.

    Args:
        logits: [K, V] logits at the K positions that predict a response token.
        targets: [K] the tokens they predict.
        segments: [K] which of the responses each belongs to, in 0..responses-1.
        responses: number of responses.

    Returns:
        [responses] log p(y|x), a sum over the response's tokens, its end token included.
    """
    logits = logits.float()
    chosen = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.zeros(responses, device=logits.device).index_add(0, segments, chosen)
