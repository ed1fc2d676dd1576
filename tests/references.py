"""Log-probabilities by their definition, slow and obvious."""

import math

import torch
from transformers import LlamaForCausalLM


def slow_logps(logits: list[list[float]], targets: list[int], segments: list[int], responses: int) -> list[float]:
    """log_softmax and its sum by the definition, on python floats."""
    sums = [0.0] * responses
    for row, target, segment in zip(logits, targets, segments, strict=True):
        highest = max(row)
        normaliser = highest + math.log(sum(math.exp(value - highest) for value in row))
        sums[segment] += row[target] - normaliser
    return sums


def naive_logp(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt), one token at a time: each is predicted from all before it and nothing else."""
    total = 0.0
    for position, token in enumerate(response):
        context = torch.tensor([[*prompt, *response[:position]]])
        last = model(input_ids=context).logits[0, -1].double().tolist()
        total += slow_logps([last], [token], [0], 1)[0]
    return total
