"""Agreement check: did vLLM generate the synthetic responses with the model that training starts from?

The first loss of an iteration is ln 2 whatever vLLM loaded, because both of its sides come from the policy. So vLLM
returns the token log-probs of some responses, and the policy scores the same tokens before its first step. This
catches an adapter that was not applied, a merge that lost a tensor, or a patch that only training applies.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from spin_plugin.console import SpinError, note, warn
from spin_plugin.generation.job import SCORED

COMPARED = 64  # pairs; every rank scores all of them
# Mean |Δ| in nats per token. Measured: 3e-7 with fp32 on both sides, 4e-2 for single tokens in 16 bits. Published for
# 16 bits: a KL of 4e-4 to 1e-2, and 0.1 as a limit.
EXACT, SUSPECT, ROUNDED = 1e-3, 0.05, 0.1
WHAT_TO_DO = (
    "Look for an option or adapter type that only one side applies, remove it, then remove the responses with "
    "`axolotl spin reset`"
)


class Comparable(NamedTuple):
    """Pairs of this iteration whose synthetic response vLLM has scored."""

    pairs: list[dict[str, Any]]
    vllm_logps: list[list[float]]
    """vLLM's log-prob of each token of each synthetic response."""


def comparable(responses: Iterable[Mapping[str, Any]], pairs: Dataset, iteration: int) -> Comparable:
    """Find the pairs of scored responses; some responses, such as identical or empty ones, become no pair.

    Args:
        responses: the iteration's responses, in the order of the requests; scored ones hold `logps` and are among the
            first `SCORED` of the training split.
        pairs: the iteration's training pairs. There can be many, so they are not read one by one.
        iteration: the current iteration.
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
    """How far policy and vLLM are apart: Δ = log p(policy) - log p(vLLM) of each token that vLLM generated."""

    mean: float
    """Mean of |Δ|, in nats."""
    largest: float
    kl: float
    """KL(vLLM || policy) in nats per token: the mean of exp(Δ) - 1 - Δ (k3 of joschu.net/blog/kl-approx)."""
    tokens: int
    responses: int

    def __str__(self) -> str:
        return (
            f"vLLM and the policy are {self.mean:.1g} nats per token apart on average (KL {self.kl:.1g}, largest "
            f"{self.largest:.1g}) in {self.tokens:,} tokens of {self.responses} responses"
        )


def distance(vllm: Sequence[Sequence[float]], policy: Sequence[Tensor]) -> Distance | None:
    """Compare the token log-probs of each response, up to the last token that vLLM scored; None if it scored none.

    Args:
        vllm: vLLM's token log-probs, by response.
        policy: the policy's, one for each token of the response.
    """
    apart = [
        values[: len(given)].cpu().double() - torch.tensor(given, dtype=torch.double)
        for given, values in zip(vllm, policy, strict=True)
    ]
    delta = torch.cat([torch.empty(0, dtype=torch.double), *apart])
    if not len(delta):
        return None
    kl = (delta.expm1() - delta).mean().item()
    return Distance(delta.abs().mean().item(), delta.abs().max().item(), kl, len(delta), len(apart))


def require_agreement(found: Distance | None, iteration: int, *, exact: bool, quantized: bool) -> None:
    """Report how far vLLM and the policy are apart; refuse to train if another model generated the responses.

    Args:
        found: the result of `distance`.
        iteration: the current iteration.
        exact: both sides compute in fp32 throughout.
        quantized: training uses another (quantized) form of the base model than vLLM, so only report the distance.

    Raises:
        SpinError: the distance is larger than rounding explains.
    """
    if found is None:
        warn(
            f"iteration {iteration}: cannot check that vLLM generated with the model that training starts from: none "
            "of the responses it scored became a pair (see the statistics of the pairs)"
        )
        return
    said = f"iteration {iteration}: {found}"
    allowed = EXACT if exact else ROUNDED
    if quantized:
        note(said)
    elif not found.mean <= allowed:  # also refuses NaN
        raise SpinError(
            f"{said}, more than the {allowed:g} that rounding explains: the responses were generated by another model "
            f"than the one that training starts from. {WHAT_TO_DO}"
        )
    elif found.mean > SUSPECT:
        warn(f"{said}, which is high for rounding alone. {WHAT_TO_DO}")
    else:
        note(said)
