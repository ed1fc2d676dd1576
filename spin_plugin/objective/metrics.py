"""What training logs of every pair besides its loss."""

import torch
from torch import Tensor

from spin_plugin.objective.losses import LOSSES, SpinTerms

# A pair is past saturation when it pulls with less than this share of the force it has at margin 0.
SATURATED_BELOW = 0.01


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
