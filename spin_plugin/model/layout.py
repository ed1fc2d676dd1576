"""A micro-batch of pairs as the tensors the model sees, in one of two forms.

The padded form, the reference: 2B sequences `prompt | response`, the real ones first, padded on the
right to the longest. The flat form: one row `prompt | real | synthetic` of each pair back to back,
without padding and with each prompt once; it needs the attention of `spin_plugin.model.attention`.

In both, `keep`, `targets` and `segments` [K] name the positions whose logits predict a response token
(counted in the flattened [rows * width]), those tokens, and which of the R responses each belongs to;
`lengths` [R] are the responses' lengths, and `sides` [2, B] say which response is the real and which the
synthetic side of each pair.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Token ids of one pair."""

    prompt: Sequence[int]
    real: Sequence[int]
    synthetic: Sequence[int]


def padded_batch(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Tensor]:
    """The padded form of B pairs.

    Returns:
        input_ids, attention_mask: [2B, L]; keep, targets, segments: [K], `keep` counted in the
        flattened [2B * L]; lengths: [2B]; sides: [2, B].
    """
    sequences = [(pair.prompt, pair.real) for pair in pairs] + [(pair.prompt, pair.synthetic) for pair in pairs]
    return _sequences(sequences, pad_token_id) | {"sides": _sides(len(pairs))}


def single_batch(prompt: Sequence[int], response: Sequence[int]) -> dict[str, Tensor]:
    """One sequence alone, without padding: what a response's log-probability is by definition.

    Returns:
        As `padded_batch` with one row [1, L] and one response, lengths [1]; no attention_mask and no sides.
    """
    batch = _sequences([(prompt, response)], 0)
    del batch["attention_mask"]
    return batch


def _sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Prompts and responses as rows, padded on the right; lengths are those of the responses, one a row."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    keep, targets, segments = [], [], []
    for row, (prompt, response) in enumerate(sequences):
        tokens = torch.as_tensor([*prompt, *response], dtype=torch.long)
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        # the token at position i is predicted by the logits at i - 1: a prompt is never empty
        keep.append(torch.arange(len(prompt) - 1, len(tokens) - 1) + row * width)
        targets.append(tokens[len(prompt) :])
        segments.append(torch.full((len(response),), row))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "keep": torch.cat(keep),
        "targets": torch.cat(targets),
        "segments": torch.cat(segments),
        "lengths": torch.tensor([len(response) for _, response in sequences]),
    }


def shared_prefix_batch(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The flat form of B pairs with T tokens in all.

    Returns:
        input_ids, position_ids: [1, T], positions as if each response stood directly after its prompt
        alone; spans: [B, 4] where a pair starts and the lengths of prompt, real and synthetic response;
        keep, targets, segments: [K]; lengths: [2B]; sides: [2, B].
    """
    tokens, positions, keep, targets, spans, start = [], [], [], [], [], 0
    for pair in pairs:
        prompt, real, synthetic = (len(part) for part in pair)
        end = prompt + real
        tokens += [torch.as_tensor(part, dtype=torch.long) for part in pair]
        positions += [torch.arange(end), torch.arange(prompt, prompt + synthetic)]
        # the prompt's last position predicts the first token of both responses: a prompt is never empty
        before_synthetic = torch.arange(end - 1, end + synthetic - 1)
        before_synthetic[:1] = prompt - 1
        keep.append((torch.arange(prompt - 1, end - 1) + start, before_synthetic + start))
        targets.append((tokens[-2], tokens[-1]))
        spans.append((start, prompt, real, synthetic))
        start += end + synthetic
    lengths = torch.tensor(spans)[:, 2:].T.flatten()
    return {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat(positions)[None],
        "spans": torch.tensor(spans),
        "keep": torch.cat([side[row] for row in range(2) for side in keep]),
        "targets": torch.cat([side[row] for row in range(2) for side in targets]),
        "segments": torch.arange(lengths.numel()).repeat_interleave(lengths),
        "lengths": lengths,
        "sides": _sides(len(pairs)),
    }


def _sides(pairs: int) -> Tensor:
    """[2, B]: the real responses come first, then the synthetic ones."""
    return torch.arange(2 * pairs).view(2, -1)


def by_token(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with each of its K response tokens as a response of its own.

    Whatever gives [R] log-probabilities of responses then gives [K], one a token.
    """
    tokens = torch.arange(len(batch["targets"]), device=batch["targets"].device)
    return batch | {"segments": tokens, "lengths": torch.ones_like(tokens)}


def response_numbers(pairs: Tensor) -> Tensor:
    """[2, n] numbers of the real and the synthetic response of each of n pairs: where the opponent's log-probabilities
    of them are stored."""
    return torch.stack([2 * pairs, 2 * pairs + 1])


class PairCollator:
    """Rows of the pairs dataset to a micro-batch, padded or with shared prefixes.

    The dataloaders, and with them their collator, exist before the model is wrapped and its layout chosen: so the
    trainer sets `shared_prefix` afterwards.
    """

    def __init__(self, tokenizer: Any, **_padding: Any) -> None:
        # Axolotl hands its own padding options to every collator; the layout needs none of them.
        self.shared_prefix = False
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [Pair(row["prompt"], row["real"], row["synthetic"]) for row in rows]
        batch = shared_prefix_batch(pairs) if self.shared_prefix else padded_batch(pairs, self.pad_token_id)
        batch["responses"] = response_numbers(torch.tensor([row["index"] for row in rows])).flatten()
        return batch
