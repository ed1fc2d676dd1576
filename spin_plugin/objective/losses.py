"""The losses of SPIN and its successors.

SPIN (arXiv 2401.01335, equation 4.7) minimizes

    L(theta) = E[ l(z) ],  z = beta * r - beta * r'

with r = log p_theta(y|x) - log p_t(y|x) for the real response y, and r' the same for the synthetic response
y' ~ p_t(.|x). theta is the main player, p_t the opponent, z the reward margin, and l convex and decreasing. `space` has
one term per side instead, and `t_spin` uses log-probs without an opponent.

Two additions work with every loss: `real_penalty` lowers the real side's score where the real response has lost
likelihood, and `sft_weight` adds SFT's own loss.

To add a loss, add an entry to `LOSSES`; the option `loss_type` and the reference are built from it. Importing this
module does not import torch, which keeps `axolotl spin status` fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def _softplus(z: Tensor) -> Tensor:
    from torch.nn.functional import softplus

    return softplus(z)


class Objective(NamedTuple):
    """A loss and its options, as in the `spin:` block."""

    loss: str = "logistic"
    """A key of `LOSSES`."""
    beta: float = 0.1
    """The paper's lambda."""
    space_mu: float = 1.0
    t_spin_weight: float = 0.1
    real_penalty: float = 0.0
    sft_weight: float = 0.0


class Scores(NamedTuple):
    """What a loss compares: [B] each, fp32, in units of beta times a log-prob."""

    real: Tensor
    """The reward beta r; in a reference-free loss beta log p(y). `real_penalty` is subtracted."""
    synthetic: Tensor
    """The same for the synthetic response."""
    initial: Tensor | None = None
    """The same for iteration 0's response to the prompt, y0. -inf without one, where its term and gradient are 0."""

    @property
    def margin(self) -> Tensor:
        return self.real - self.synthetic


class Loss(NamedTuple):
    """A sum of convex terms, each of one difference of scores."""

    value: Callable[[Scores, Objective], Tensor]
    """Returns [B]."""
    slopes: Callable[[Scores, Objective], list[Tensor]]
    """The weight of each term's gradient, [B] each; the first term is the one with the real response."""
    formula: str
    start: str
    """Its value before the first step."""
    source: str
    when: str
    """When to choose it; shown in the reference."""
    options: tuple[str, ...] = ()
    """Options that no other loss has."""
    reference_free: bool = False
    """Scores are log-probs instead of rewards against the opponent."""
    uses_initial: bool = False
    """Compares with iteration 0's responses."""


def of_margin(
    value: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    *,
    formula: str,
    start: str,
    source: str,
    when: str,
) -> Loss:
    """Return SPIN's loss for a convex, decreasing l of the margin z.

    Args:
        value: l.
        slope: -l', the weight of a pair's gradient; not negative.
    """
    return Loss(
        lambda scores, _: value(scores.margin), lambda scores, _: [slope(scores.margin)], formula, start, source, when
    )


def _space(scores: Scores, objective: Objective) -> Tensor:
    mu, shift = objective.space_mu, math.log(objective.space_mu)
    return _softplus(shift - scores.real) + mu * _softplus(scores.synthetic - shift)


def _space_slopes(scores: Scores, objective: Objective) -> list[Tensor]:
    mu, shift = objective.space_mu, math.log(objective.space_mu)
    return [(shift - scores.real).sigmoid(), mu * (scores.synthetic - shift).sigmoid()]


def _t_spin(scores: Scores, objective: Objective) -> Tensor:
    loss = _softplus(-scores.margin)
    if scores.initial is None:
        return loss
    return loss + objective.t_spin_weight * _softplus(scores.initial - scores.synthetic)


def _t_spin_slopes(scores: Scores, objective: Objective) -> list[Tensor]:
    slopes = [(-scores.margin).sigmoid()]
    if scores.initial is not None:
        slopes.append(objective.t_spin_weight * (scores.initial - scores.synthetic).sigmoid())
    return slopes


LOSSES: dict[str, Loss] = {
    "logistic": of_margin(
        lambda z: _softplus(-z),
        lambda z: (-z).sigmoid(),
        formula="log(1 + exp(-z))",
        start="ln 2",
        source="arXiv 2401.01335, equation 4.7; used in all its experiments",
        when="Default. A pair's gradient fades as its margin grows, whichever side the margin comes from.",
    ),
    "space": Loss(
        _space,
        _space_slopes,
        formula="-log σ(beta r - ln mu) - mu log σ(-beta r' + ln mu)",
        start="ln(1 + mu) + mu ln(1 + 1 / mu); 2 ln 2 at mu = 1",
        source="arXiv 2512.07175 (SPACE); at mu = 1 also arXiv 2410.10093 (GSIL) and TRL's `bco_pair`. From a summary, "
        "not compared with the papers' text",
        when="If `spin/reward_real` falls: each side has its own term, so a falling synthetic response does not end "
        "the push on the real one.",
        options=("space_mu",),
    ),
    "t_spin": Loss(
        _t_spin,
        _t_spin_slopes,
        formula="l(beta (log p(y) - log p(y'))) + w l(beta (log p(y') - log p(y0))), l logistic",
        start="depends on the model",
        source="arXiv 2601.08198 (T-SPIN), compared with the paper's text",
        when="To train over many iterations: without an opponent in the loss, and with iteration 0's response y0 as an "
        "anchor. The paper sets `beta: 1` and `history_iterations: 0`.",
        options=("t_spin_weight",),
        reference_free=True,
        uses_initial=True,
    ),
    "hinge": of_margin(
        lambda z: (1 - z).relu(),
        lambda z: (z < 1).to(z.dtype),
        formula="max(0, 1 - z)",
        start="1",
        source="arXiv 2401.01335, section 4.1",
        when="To ignore pairs whose margin has reached 1 and weight all others equally.",
    ),
    "exponential": of_margin(
        lambda z: (-z).exp(),
        lambda z: (-z).exp(),
        formula="exp(-z)",
        start="1",
        source="arXiv 2401.01335, section 4.1",
        when="To weight misranked pairs most. A single outlier can dominate a step.",
    ),
    "correlation": of_margin(
        lambda z: 1 - z,
        lambda z: z.new_ones(z.shape),
        formula="1 - z",
        start="1",
        source="arXiv 2401.01335, section 4.1 (integral probability metric)",
        when="For analysis. Linear, so it never saturates: only the learning rate limits the margin.",
    ),
}


class SpinTerms(NamedTuple):
    """Loss and rewards of a micro-batch of B pairs; every tensor is [B], fp32."""

    loss: Tensor
    reward_real: Tensor
    reward_synthetic: Tensor
    scores: Scores

    @property
    def margin(self) -> Tensor:
        """The reward margin z."""
        return self.reward_real - self.reward_synthetic


def spin_terms(
    policy: Tensor,
    opponent: Tensor,
    sides: Tensor,
    objective: Objective,
    *,
    lengths: Tensor | None = None,
    initial: Tensor | None = None,
) -> SpinTerms:
    """Compute the loss and rewards of each pair.

    Args:
        policy: [R] summed log-probs of every response under the policy (the paper's main player).
        opponent: [R] the same under the opponent; no gradient flows into it. Only the values at `sides` are used.
        sides: [2, B] index of the real (row 0) and the synthetic (row 1) response of each pair.
        objective: the loss and its options.
        lengths: [R] response lengths in tokens, for `sft_weight`.
        initial: [B] index of iteration 0's response to each pair's prompt, or -1, for losses that use it.
    """
    loss = LOSSES[objective.loss]
    reward_real, reward_synthetic = (objective.beta * (policy - opponent.detach()))[sides]
    scores = Scores(reward_real, reward_synthetic)
    if loss.reference_free:
        scores = Scores(*(objective.beta * policy)[sides])
    if loss.uses_initial and initial is not None:
        found = objective.beta * policy[initial.clamp(min=0)]
        scores = scores._replace(initial=found.masked_fill(initial < 0, -math.inf))
    if objective.real_penalty:
        # DPO-Positive (arXiv 2402.13228, from a summary): lambda max(0, -beta r)
        scores = scores._replace(real=scores.real - objective.real_penalty * (-reward_real).relu())
    value = loss.value(scores, objective)
    if objective.sft_weight:
        assert lengths is not None
        value = value - objective.sft_weight * (policy / lengths)[sides[0]]
    return SpinTerms(value, reward_real, reward_synthetic, scores)
