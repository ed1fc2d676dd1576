"""What training logs of every pair: one entry a metric, read by the trainer, `axolotl spin status` and the docs.

Importing this module loads no torch, so that `axolotl spin status` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from spin_plugin.objective.losses import LOSSES, SpinTerms

if TYPE_CHECKING:
    from torch import Tensor

# A pair is past saturation when it pulls with less than this share of the force it has at margin 0.
SATURATED_BELOW = 0.01


class Batch(NamedTuple):
    """What a metric may look at: B pairs, all tensors detached."""

    terms: SpinTerms
    logps: Tensor
    """[2, B] summed log-probabilities of the main player, of the real and the synthetic responses."""
    lengths: Tensor
    """[2, B] tokens of the responses."""
    loss: str
    """A key of `LOSSES`."""


class Metric(NamedTuple):
    """A number of each pair, logged as its mean."""

    value: Callable[[Batch], Tensor]
    """[B] of a batch."""
    formula: str
    meaning: str
    column: str | None = None
    """Its heading in the table of `axolotl spin status`, where it has one."""


def _saturated(batch: Batch) -> Tensor:
    margin, slope = batch.terms.margin, LOSSES[batch.loss].slope
    return slope(margin) < SATURATED_BELOW * slope(margin.new_zeros(()))


METRICS: dict[str, Metric] = {
    "loss": Metric(lambda batch: batch.terms.loss, "l(z)", "ln 2 at the first step (logistic), then falling", "loss"),
    "reward_real": Metric(
        lambda batch: batch.terms.reward_real,
        "beta (log p(y) - log p_t(y))",
        "above 0: real responses have become more likely than under the opponent",
    ),
    "reward_synthetic": Metric(
        lambda batch: batch.terms.reward_synthetic,
        "beta (log p(y') - log p_t(y'))",
        "below 0: the opponent's own responses have become less likely",
    ),
    "reward_margin": Metric(
        lambda batch: batch.terms.margin,
        "z = reward_real - reward_synthetic",
        "0 at the first step, then rising",
        "margin",
    ),
    "accuracy": Metric(
        lambda batch: batch.terms.margin > 0,
        "share of z > 0",
        "how many pairs are told apart; equal ones cannot be",
        "accuracy",
    ),
    "saturated": Metric(
        _saturated,
        f"share of -l'(z) < {SATURATED_BELOW} of -l'(0)",
        "pairs with near-zero gradient; when most are, the iteration has nothing left to learn",
    ),
    "logp_real": Metric(lambda batch: batch.logps[0], "log p(y)", "rising, or falling less than logp_synthetic"),
    "logp_synthetic": Metric(lambda batch: batch.logps[1], "log p(y')", "falling"),
    "logp_real_per_token": Metric(
        lambda batch: batch.logps[0] / batch.lengths[0], "log p(y) / tokens of y", "the same, whatever the lengths"
    ),
    "logp_synthetic_per_token": Metric(
        lambda batch: batch.logps[1] / batch.lengths[1], "log p(y') / tokens of y'", "the same, whatever the lengths"
    ),
}


def metric_sums(terms: SpinTerms, policy: Tensor, lengths: Tensor, sides: Tensor, *, loss: str) -> Tensor:
    """Sums over the pairs of the micro-batch, to be divided by the number of pairs when they are logged.

    Args:
        terms: what `spin_terms` gave.
        policy: [R] summed log-probabilities of the main player.
        lengths: [R] response lengths in tokens.
        sides: [2, B] which of the responses are the real and the synthetic side of each pair.
        loss: a key of `LOSSES`.

    Returns:
        [len(METRICS)] detached, in the order of `METRICS`; no host synchronisation happens.
    """
    import torch

    detached = SpinTerms(*(term.detach() for term in terms))
    batch = Batch(detached, policy.detach()[sides], lengths[sides], loss)
    return torch.stack([metric.value(batch).float().sum() for metric in METRICS.values()])
