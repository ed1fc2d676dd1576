"""Training metrics: one entry per metric, shared by the trainer, `axolotl spin status` and the reference.

Importing this module does not import torch, which keeps `axolotl spin status` fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from spin_plugin.objective.losses import LOSSES, Objective, Scores, SpinTerms

if TYPE_CHECKING:
    from torch import Tensor

SATURATED_BELOW = 0.01
"""A pair is saturated when the gradient of each of its terms is below this fraction of that at scores of 0."""


class Batch(NamedTuple):
    """The input of every metric: B pairs."""

    terms: SpinTerms
    logps: Tensor
    """[2, B] summed log-probs of the real and the synthetic responses under the main player."""
    lengths: Tensor
    """[2, B] response lengths in tokens."""
    objective: Objective


class Metric(NamedTuple):
    """A per-pair value, logged as its mean over pairs."""

    value: Callable[[Batch], Tensor]
    """Returns [B]."""
    formula: str
    meaning: str
    column: str | None = None
    """Column heading in `axolotl spin status`; None omits the metric there."""


def _saturated(batch: Batch) -> Tensor:
    """Return whether the gradients on both sides have faded, apart from that of `sft_weight`, which never does."""
    scores, objective = batch.terms.scores, batch.objective
    slopes = LOSSES[objective.loss].slopes
    zero = scores.real.new_zeros(())
    at_zero = slopes(Scores(zero, zero, None if scores.initial is None else zero), objective)
    first, *others = slopes(scores, objective)
    if objective.real_penalty:  # which steepens the real side where it has lost
        first = first * (1 + objective.real_penalty * (batch.terms.reward_real < 0))
    saturated = first < SATURATED_BELOW * at_zero[0]
    for slope, at_start in zip(others, at_zero[1:], strict=True):
        saturated = saturated & (slope < SATURATED_BELOW * at_start)
    return saturated


METRICS: dict[str, Metric] = {
    "loss": Metric(
        lambda batch: batch.terms.loss,
        "the loss, with its additions",
        "starts at the value in the table of losses and should fall",
        "loss",
    ),
    "reward_real": Metric(
        lambda batch: batch.terms.reward_real,
        "beta (log p(y) - log p_t(y))",
        "above 0: real responses are more likely than under the opponent",
    ),
    "reward_synthetic": Metric(
        lambda batch: batch.terms.reward_synthetic,
        "beta (log p(y') - log p_t(y'))",
        "below 0: synthetic responses are less likely than under the opponent",
    ),
    "reward_margin": Metric(
        lambda batch: batch.terms.margin,
        "z = reward_real - reward_synthetic",
        "starts at 0 and should rise",
        "margin",
    ),
    "accuracy": Metric(
        lambda batch: batch.terms.margin > 0,
        "share of pairs with z > 0",
        "pairs ranked correctly; identical responses count as misses",
        "accuracy",
    ),
    "saturated": Metric(
        _saturated,
        f"share of pairs whose gradient weight on both sides is below {SATURATED_BELOW:.0%} of that at the start",
        "once most are saturated, the iteration has little left to learn; with `t_spin`, relative to equal log-probs "
        "instead of the start; `sft_weight` is not counted",
    ),
    "logp_real": Metric(
        lambda batch: batch.logps[0], "log p(y)", "should rise, or at least fall less than `spin/logp_synthetic`"
    ),
    "logp_synthetic": Metric(lambda batch: batch.logps[1], "log p(y')", "should fall"),
    "logp_real_per_token": Metric(
        lambda batch: batch.logps[0] / batch.lengths[0],
        "log p(y) / tokens of y",
        "`spin/logp_real`, independent of response length",
    ),
    "logp_synthetic_per_token": Metric(
        lambda batch: batch.logps[1] / batch.lengths[1],
        "log p(y') / tokens of y'",
        "`spin/logp_synthetic`, independent of response length",
    ),
}


def metric_sums(terms: SpinTerms, policy: Tensor, lengths: Tensor, sides: Tensor, objective: Objective) -> Tensor:
    """Sum every metric over the pairs of a micro-batch; the trainer divides by the number of pairs when it logs.

    Args:
        terms: the result of `spin_terms`.
        policy: [R] summed log-probs of every response under the policy.
        lengths: [R] response lengths in tokens.
        sides: [2, B] index of the real (row 0) and the synthetic (row 1) response of each pair.
        objective: the loss and its options.

    Returns:
        [len(METRICS)], detached, in the order of `METRICS`. Never synchronizes with the device.
    """
    import torch

    with torch.no_grad():
        batch = Batch(terms, policy[sides], lengths[sides], objective)
        return torch.stack([metric.value(batch).float().sum() for metric in METRICS.values()])
