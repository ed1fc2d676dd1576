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
