"""Build the model's input tensors for a micro-batch of pairs, in one of two layouts.

Padded layout: 2B sequences `prompt | response`, the real ones first, padded on the right to the longest.

Shared-prefix layout: one row with `prompt | real | synthetic` of each pair back to back, without padding and with
each prompt only once. It needs the attention of `spin_plugin.model.attention`.

Both layouts have:
    keep: [K] positions whose logits predict a response token, as indices into the flattened [rows * width].
    targets: [K] the predicted tokens.
    segments: [K] which of the R responses each token belongs to.
    lengths: [R] response lengths in tokens.
    sides: [2, B] index of the real (row 0) and the synthetic (row 1) response of each pair.
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
    """Build the padded layout of B pairs.

    Returns:
        input_ids, attention_mask: [2B, L]; keep, targets, segments: [K], with `keep` indexing the
        flattened [2B * L]; lengths: [2B]; sides: [2, B].
    """
    sequences = [(pair.prompt, pair.real) for pair in pairs] + [(pair.prompt, pair.synthetic) for pair in pairs]
    return _sequences(sequences, pad_token_id) | {"sides": _sides(len(pairs))}


def single_batch(prompt: Sequence[int], response: Sequence[int]) -> dict[str, Tensor]:
    """Build one unpadded sequence, the reference for a response's log-probability.

    Returns:
        Like `padded_batch`, with one row [1, L] and lengths [1], but without attention_mask and sides.
    """
    batch = _sequences([(prompt, response)], 0)
    del batch["attention_mask"]
    return batch


def _sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Build one right-padded row per (prompt, response)."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    keep, targets, segments = [], [], []
    for row, (prompt, response) in enumerate(sequences):
        tokens = torch.as_tensor([*prompt, *response], dtype=torch.long)
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        # The logits at i - 1 predict the token at i, so prompts must not be empty.
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
    """Build the shared-prefix layout of B pairs with T tokens in total.

    Returns:
        input_ids, position_ids: [1, T], with both responses positioned directly after the prompt; spans: [B, 4] start
        of each pair and the lengths of its prompt, real and synthetic response; keep, targets, segments: [K];
        lengths: [2B]; sides: [2, B].
    """
    tokens, positions, keep, targets, spans, start = [], [], [], [], [], 0
    for pair in pairs:
        prompt, real, synthetic = (len(part) for part in pair)
        end = prompt + real
        tokens += [torch.as_tensor(part, dtype=torch.long) for part in pair]
        positions += [torch.arange(end), torch.arange(prompt, prompt + synthetic)]
        # The prompt's last position predicts the first token of both responses.
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
    """Return [2, B] `sides` for responses ordered real first, then synthetic."""
    return torch.arange(2 * pairs).view(2, -1)


def split_into_tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with each of its K response tokens as a separate response.

    Functions that return [R] log-probs then return [K], one per token.
    """
    tokens = torch.arange(len(batch["targets"]), device=batch["targets"].device)
    return batch | {"segments": tokens, "lengths": torch.ones_like(tokens)}


def response_indices(pairs: Tensor) -> Tensor:
    """Return the [2, n] storage indices of the opponent's log-probs, real then synthetic, for [n] pair indices."""
    return torch.stack([2 * pairs, 2 * pairs + 1])


class PairCollator:
    """Collate rows of the pairs dataset into a padded or shared-prefix micro-batch.

    The collator is created before the model is wrapped and its layout chosen; the trainer sets `shared_prefix` later.
    """

    def __init__(self, tokenizer: Any, **_padding: Any) -> None:
        # Axolotl passes its padding options to every collator; none applies here.
        self.shared_prefix = False
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [Pair(row["prompt"], row["real"], row["synthetic"]) for row in rows]
        batch = shared_prefix_batch(pairs) if self.shared_prefix else padded_batch(pairs, self.pad_token_id)
        batch["responses"] = response_indices(torch.tensor([row["index"] for row in rows])).flatten()
        return batch
