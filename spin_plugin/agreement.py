"""Whether vLLM drew the synthetic responses from the very model that training starts from.

The first loss of an iteration is ln 2 whatever vLLM loaded, for both of its sides are the policy's. So vLLM says of its
first responses how likely they are, and the policy, which has just scored all pairs, is compared with that: an adapter
that was not applied, a merge that lost a tensor or a patch that only training knows shows here.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from torch import Tensor

from spin_plugin.generation.job import SCORED
from spin_plugin.messages import SpinError, say

# Nats a token that rounding explains. Measured: up to 3e-7 with 32 bits on both sides; single tokens 4e-2 with 16.
EXACT, ROUNDED = 1e-3, 0.1


def disagreement(drawn: Iterable[Mapping[str, Any]], pairs: Dataset, logps: Tensor, iteration: int) -> float | None:
    """How far the responses' log-probabilities are apart, a token; None where vLLM has given none.

    Args:
        drawn: the iteration's responses, in the order of the requests; the first ones hold `logp`.
        pairs: of this iteration's training split, the newest responses first.
        logps: [2, N] the policy's log-probabilities of the pairs before its first step.
        iteration: the one that is being played.
    """
    scored = {
        (response["example"], *response["tokens"]): response["logp"]
        for response in islice(drawn, SCORED)
        if response["split"] == "train" and response["tokens"] and "logp" in response
    }
    apart, tokens = 0.0, 0
    for index in range(min(SCORED, len(pairs))):
        pair = pairs[index]
        key = (pair["example"], *pair["synthetic"])
        if pair["iteration"] == iteration and key in scored:
            apart += abs(scored[key] - logps[1, index].item())
            tokens += len(pair["synthetic"])
    return apart / tokens if tokens else None


def require_agreement(difference: float | None, iteration: int, *, exact: bool, quantised: bool) -> None:
    """Refuse to train against an opponent that did not draw the responses.

    Args:
        difference: what `disagreement` found.
        iteration: the one that is being played.
        exact: both sides compute with 32 bits, all of them.
        quantised: training has another form of the base model, as a warning has said, so there is nothing to refuse.

    Raises:
        SpinError: they differ by more than rounding explains.
    """
    if difference is None:
        return
    said = f"iteration {iteration}: vLLM and the policy are {difference:.1g} nats a token apart in the responses"
    allowed = EXACT if exact else ROUNDED
    if not (difference <= allowed or quantised):  # NaN is no agreement
        raise SpinError(
            f"{said}, and rounding explains {allowed:g}: they were drawn from another model than the one that training "
            "starts from. Look for what only one of them knows (an option that changes the model, a kind of adapter), "
            "take it back, and remove the responses with `axolotl spin reset`"
        )
    say(said)
