"""The SPIN losses.

SPIN (arXiv 2401.01335, equation 4.7) minimizes

    L(theta) = E[ l(z) ],  z = beta * r - beta * r'

with r = log p_theta(y|x) - log p_t(y|x) for the real response y, and r' the same for the synthetic response
y' ~ p_t(.|x). theta is the main player, p_t the opponent, z the reward margin, and l convex and decreasing.

To add a loss, add an entry to `LOSSES`; the option `loss_type` and the reference are built from it. Importing this
module does not import torch, which keeps `axolotl spin status` fast.
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
    """A convex, decreasing function l of the reward margin z."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """-l'(z), the weight of a pair's gradient."""
    formula: str
    source: str
    when: str
    """When to choose it; shown in the reference."""


LOSSES: dict[str, Loss] = {
    "logistic": Loss(
        lambda z: _softplus(-z),
        lambda z: (-z).sigmoid(),
        formula="log(1 + exp(-z))",
        source="arXiv 2401.01335, equation 4.7; used in all its experiments",
        when="Default. Starts at ln 2; a pair's gradient fades as its margin grows.",
    ),
    "hinge": Loss(
        lambda z: (1 - z).relu(),
        lambda z: (z < 1).to(z.dtype),
        formula="max(0, 1 - z)",
        source="arXiv 2401.01335, section 4.1",
        when="To ignore pairs whose margin has reached 1 and weight all others equally.",
    ),
    "exponential": Loss(
        lambda z: (-z).exp(),
        lambda z: (-z).exp(),
        formula="exp(-z)",
        source="arXiv 2401.01335, section 4.1",
        when="To weight misranked pairs most. A single outlier can dominate a step.",
    ),
    "correlation": Loss(
        lambda z: 1 - z,
        lambda z: z.new_ones(z.shape),
        formula="1 - z",
        source="arXiv 2401.01335, section 4.1 (integral probability metric)",
        when="For analysis. Linear, so it never saturates: only the learning rate limits the margin.",
    ),
}


class SpinTerms(NamedTuple):
    """Loss and rewards of a micro-batch of B pairs; every field is [B], fp32."""

    loss: Tensor
    reward_real: Tensor
    reward_synthetic: Tensor

    @property
    def margin(self) -> Tensor:
        """The reward margin z."""
        return self.reward_real - self.reward_synthetic


def spin_terms(policy: Tensor, opponent: Tensor, sides: Tensor, *, beta: float, loss: str) -> SpinTerms:
    """Compute the loss and rewards of each pair.

    Args:
        policy: [R] summed log-probs of every response under the policy (the paper's main player).
        opponent: [R] the same under the opponent; no gradient flows into it.
        sides: [2, B] index of the real (row 0) and the synthetic (row 1) response of each pair.
        beta: the paper's lambda.
        loss: a key of `LOSSES`.
    """
    reward_real, reward_synthetic = (beta * (policy - opponent.detach()))[sides]
    return SpinTerms(LOSSES[loss].value(reward_real - reward_synthetic), reward_real, reward_synthetic)
