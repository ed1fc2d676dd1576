"""Whether vLLM drew the synthetic responses from the very model that training starts from.

The first loss of an iteration is ln 2 whatever vLLM loaded, for both of its sides are the policy's. So vLLM says of
some responses how likely each of their tokens was, and the policy is asked the same before its first step: an adapter
that was not applied, a merge that lost a tensor or a patch that only training knows shows here.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from spin_plugin.console import SpinError, say, warn
from spin_plugin.generation.job import SCORED

COMPARED = 64  # pairs; each process scores all of them
# Nats a token, the mean of |Δ|. Measured: 3e-7 with 32 bits on both sides, 4e-2 in single tokens with 16; published for
# 16 bits: a KL of 4e-4 to 1e-2, and 0.1 as a limit.
EXACT, SUSPECT, ROUNDED = 1e-3, 0.05, 0.1
WHAT_TO_DO = (
    "Look for what only one of them knows (an option that changes the model, a kind of adapter), take it back, and "
    "remove the responses with `axolotl spin reset`"
)


class Comparable(NamedTuple):
    """Pairs of this iteration whose synthetic response vLLM has scored."""

    pairs: list[dict[str, Any]]
    drawn: list[list[float]]
    """vLLM's log-probability of each token of each of their synthetic responses."""


def comparable(responses: Iterable[Mapping[str, Any]], pairs: Dataset, iteration: int) -> Comparable:
    """Find the scored responses among those that have become pairs: equal ones, empty ones and others may not.

    Args:
        responses: the iteration's, in the order of the requests; those that vLLM has scored hold `logps`, and are
            among the first `SCORED` of the training split.
        pairs: of this iteration's training split, any number of them: they are not read one by one.
        iteration: the one that is being played.
    """
    scored = {
        (response["example"], *response["tokens"]): response["logps"]
        for response in islice((response for response in responses if response["split"] == "train"), SCORED)
        if response.get("logps")
    }
    columns = pairs.select_columns(["example", "iteration"]).with_format("numpy")
    of_scored = np.isin(columns["example"][:], [example for example, *_ in scored])
    places = np.flatnonzero(of_scored & (columns["iteration"][:] == iteration))
    rows = pairs.select(places).to_list()
    found = [(row, scored[key]) for row in rows if (key := (row["example"], *row["synthetic"])) in scored]
    chosen = found[:: max(1, -(-len(found) // COMPARED))]
    return Comparable([row for row, _ in chosen], [logps for _, logps in chosen])


class Distance(NamedTuple):
    """How far policy and vLLM are apart, Δ = log p(policy) - log p(vLLM) of a token that vLLM has drawn."""

    mean: float
    """Of |Δ|, nats."""
    largest: float
    kl: float
    """KL(vLLM, policy), nats a token: the mean of exp(Δ) - 1 - Δ (k3 of joschu.net/blog/kl-approx)."""
    tokens: int
    responses: int

    def __str__(self) -> str:
        return (
            f"vLLM and the policy are {self.mean:.1g} nats a token apart on average (KL {self.kl:.1g}, largest "
            f"{self.largest:.1g}) in {self.tokens:,} tokens of {self.responses} responses"
        )


def distance(drawn: Sequence[Sequence[float]], policy: Sequence[Tensor]) -> Distance | None:
    """Compare the log-probabilities of the tokens of each response, as many as vLLM has given; None where it is none.

    Args:
        drawn: vLLM's.
        policy: the policy's, each of as many tokens as the response has.
    """
    apart = [
        values[: len(given)].cpu().double() - torch.tensor(given, dtype=torch.double)
        for given, values in zip(drawn, policy, strict=True)
    ]
    delta = torch.cat([torch.empty(0, dtype=torch.double), *apart])
    if not len(delta):
        return None
    kl = (delta.expm1() - delta).mean().item()
    return Distance(delta.abs().mean().item(), delta.abs().max().item(), kl, len(delta), len(apart))


def require_agreement(found: Distance | None, iteration: int, *, exact: bool, quantised: bool) -> None:
    """Say how far they are apart; refuse to train against an opponent that did not draw the responses.

    Args:
        found: what `distance` found.
        iteration: the one that is being played.
        exact: both sides compute with 32 bits, all of them.
        quantised: training has another form of the base model, as a warning has said, so there is nothing to refuse.

    Raises:
        SpinError: they differ by more than rounding explains.
    """
    if found is None:
        warn(
            f"iteration {iteration}: whether vLLM drew from the model that training starts from is not known: none of "
            "the responses that it has scored has become a pair (see the statistics of the pairs)"
        )
        return
    said = f"iteration {iteration}: {found}"
    allowed = EXACT if exact else ROUNDED
    if quantised:
        say(said)
    elif not found.mean <= allowed:  # NaN is no agreement
        raise SpinError(
            f"{said}, and rounding explains {allowed:g}: they were drawn from another model than the one that training "
            f"starts from. {WHAT_TO_DO}"
        )
    elif found.mean > SUSPECT:
        warn(f"{said}, which is much for rounding. {WHAT_TO_DO}")
    else:
        say(said)
