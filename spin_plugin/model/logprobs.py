"""Compute the log-probs of responses from logits."""

import torch
from torch import Tensor


def response_logps(logits: Tensor, targets: Tensor, segments: Tensor, responses: int) -> Tensor:
    """Sum the token log-probs of each response in fp32.

    Args:
        logits: [K, V] logits at the K positions that predict a response token.
        targets: [K] the predicted tokens.
        segments: [K] the response that each token belongs to, in 0..responses-1.
        responses: number of responses.

    Returns:
        [responses] log p(y|x), summed over the tokens of y, including its end token.
    """
    logits = logits.float()
    chosen = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.zeros(responses, device=logits.device).index_add(0, segments, chosen)
