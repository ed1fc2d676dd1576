"""Training metrics: one entry per metric, shared by the trainer, `axolotl spin status` and the reference.

Importing this module does not import torch, which keeps `axolotl spin status` fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from spin_plugin.objective.losses import LOSSES, SpinTerms

if TYPE_CHECKING:
    from torch import Tensor

SATURATED_BELOW = 0.01
"""A pair is saturated when its gradient is below this fraction of the gradient at margin 0."""


class Batch(NamedTuple):
    """The input of every metric: B pairs, all tensors detached."""

    terms: SpinTerms
    logps: Tensor
    """[2, B] summed log-probs of the real and the synthetic responses under the main player."""
    lengths: Tensor
    """[2, B] response lengths in tokens."""
    loss: str
    """A key of `LOSSES`."""


class Metric(NamedTuple):
    """A per-pair value, logged as its mean over pairs."""

    value: Callable[[Batch], Tensor]
    """Returns [B]."""
    formula: str
    meaning: str
    column: str | None = None
    """Column heading in `axolotl spin status`; None omits the metric there."""


def _saturated(batch: Batch) -> Tensor:
    margin, slope = batch.terms.margin, LOSSES[batch.loss].slope
    return slope(margin) < SATURATED_BELOW * slope(margin.new_zeros(()))


METRICS: dict[str, Metric] = {
    "loss": Metric(
        lambda batch: batch.terms.loss, "l(z)", "starts at ln 2 with the logistic loss and should fall", "loss"
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
        f"share of pairs with l'(z) / l'(0) < {SATURATED_BELOW}",
        "pairs with near-zero gradient; once most are saturated, the iteration has little left to learn",
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


def metric_sums(terms: SpinTerms, policy: Tensor, lengths: Tensor, sides: Tensor, *, loss: str) -> Tensor:
    """Sum every metric over the pairs of a micro-batch; the trainer divides by the number of pairs when it logs.

    Args:
        terms: the result of `spin_terms`.
        policy: [R] summed log-probs of every response under the policy.
        lengths: [R] response lengths in tokens.
        sides: [2, B] index of the real (row 0) and the synthetic (row 1) response of each pair.
        loss: a key of `LOSSES`.

    Returns:
        [len(METRICS)], detached, in the order of `METRICS`. Never synchronizes with the device.
    """
    import torch

    detached = SpinTerms(*(term.detach() for term in terms))
    batch = Batch(detached, policy.detach()[sides], lengths[sides], loss)
    return torch.stack([metric.value(batch).float().sum() for metric in METRICS.values()])
