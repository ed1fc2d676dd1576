"""Reference implementations of log-probs, straight from the definition."""

import math

import torch
from transformers import LlamaForCausalLM


def slow_logps(logits: list[list[float]], targets: list[int], segments: list[int], responses: int) -> list[float]:
    """Sum log-softmax values per response, on Python floats."""
    sums = [0.0] * responses
    for row, target, segment in zip(logits, targets, segments, strict=True):
        highest = max(row)
        normalizer = highest + math.log(sum(math.exp(value - highest) for value in row))
        sums[segment] += row[target] - normalizer
    return sums


def naive_logp(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    """Compute log p(response | prompt) one token at a time, each from exactly the tokens before it."""
    total = 0.0
    for position, token in enumerate(response):
        context = torch.tensor([[*prompt, *response[:position]]])
        last = model(input_ids=context).logits[0, -1].double().tolist()
        total += slow_logps([last], [token], [0], 1)[0]
    return total
