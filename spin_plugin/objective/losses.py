"""The SPIN objective: log-probabilities and plain numbers in, losses out.

SPIN (arXiv 2401.01335, equation 4.7), with r = log p_theta(y|x) - log p_t(y|x) for the real response y
and r' the same for the synthetic response y' ~ p_t(.|x):

    L(theta) = E[ l( beta * r - beta * r' ) ]

where l is convex and decreasing, theta is the main player and p_t the opponent.

A new loss is one entry in `LOSSES`: the option `loss_type` and its reference read them there. Importing this module
loads no torch, so that `axolotl spin status` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def _softplus(z: Tensor) -> Tensor:
    from torch.nn.functional import softplus

    return softplus(z)


class Loss(NamedTuple):
    """A convex decreasing function l of the reward margin z."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """-l'(z), how hard a pair pulls."""
    formula: str
    source: str
    use: str
    """When to choose it, in one sentence."""


LOSSES: dict[str, Loss] = {
    "logistic": Loss(
        lambda z: _softplus(-z),
        lambda z: (-z).sigmoid(),
        formula="log(1 + exp(-z))",
        source="arXiv 2401.01335, equation 4.7 and all of its experiments",
        use="The default. Starts at ln 2; pairs that are told apart pull less and less.",
    ),
    "hinge": Loss(
        lambda z: (1 - z).relu(),
        lambda z: (z < 1).to(z.dtype),
        formula="max(0, 1 - z)",
        source="arXiv 2401.01335, section 4.1",
        use="To ignore every pair whose margin is above 1, and pull at all others alike.",
    ),
    "exponential": Loss(
        lambda z: (-z).exp(),
        lambda z: (-z).exp(),
        formula="exp(-z)",
        source="arXiv 2401.01335, section 4.1",
        use="To pull hardest at pairs that are ranked wrong; one outlier can dominate a step.",
    ),
    "correlation": Loss(
        lambda z: 1 - z,
        lambda z: z.new_ones(z.shape),
        formula="1 - z",
        source="arXiv 2401.01335, section 4.1: the integral probability metric",
        use="For analysis: linear, never saturates, so nothing but the learning rate ends it.",
    ),
}


class SpinTerms(NamedTuple):
    """One micro-batch of B pairs, every field of shape [B], fp32."""

    loss: Tensor
    reward_real: Tensor
    reward_synthetic: Tensor

    @property
    def margin(self) -> Tensor:
        """The reward margin z."""
        return self.reward_real - self.reward_synthetic


def spin_terms(policy: Tensor, opponent: Tensor, sides: Tensor, *, beta: float, loss: str) -> SpinTerms:
    """Loss and rewards of each pair.

    Args:
        policy: [R] summed log-probabilities of the main player, of every response.
        opponent: [R] the same of the opponent; no gradient flows into it.
        sides: [2, B] which of the responses are the real and the synthetic side of each pair.
        beta: the paper's lambda.
        loss: a key of `LOSSES`.
    """
    reward_real, reward_synthetic = (beta * (policy - opponent.detach()))[sides]
    return SpinTerms(LOSSES[loss].value(reward_real - reward_synthetic), reward_real, reward_synthetic)
