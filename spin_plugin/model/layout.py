"""Build the model's input tensors for a micro-batch of pairs, in one of two layouts.

Padded layout: one sequence `prompt | response` per response, the real ones first, padded on the right to the longest.

Shared-prefix layout: one row with `prompt | real | synthetic` of each pair back to back, without padding and with
each prompt only once. It needs the attention of `spin_plugin.model.attention`.

With `grouped`, consecutive pairs with the same prompt and real response share these in both layouts: the row becomes
`prompt | real | synthetic 1 | … | synthetic n`, and the B pairs have G real responses. Otherwise G = B.

A synthetic response that equals the real one is not computed again: it has the real one's log-prob, so that its pair's
margin is 0 also after rounding. So there are S ≤ B synthetic responses, R = G + S.

A pair can have a third response, iteration 0's to its prompt, which only the loss `t_spin` uses. These I responses come
last: `prompt | real | synthetic … | initial …`, R = G + S + I.

Both layouts have:
    keep: [K] positions whose logits predict a response token, as indices into the flattened [rows * width].
    targets: [K] the predicted tokens.
    segments: [K] which of the R responses each token belongs to.
    lengths: [R] response lengths in tokens: the real ones, the synthetic ones, the initial ones.
    sides: [2, B] index of the real (row 0) and the synthetic (row 1) response of each pair; the same if they are equal.
    initial: [B] index of the initial response of each pair, or -1; only if a pair has one.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Token ids of one pair."""

    prompt: Sequence[int]
    real: Sequence[int]
    synthetic: Sequence[int]
    initial: Sequence[int] = ()
    """Iteration 0's response to the prompt; empty without one."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Pair":
        """Return a row of the pairs dataset, which has a column `initial` only if the loss uses it."""
        return cls(*(row.get(name, ()) for name in cls._fields))


class Group(NamedTuple):
    """Token ids of pairs that share their prompt and real response."""

    prompt: Sequence[int]
    real: Sequence[int]
    synthetic: list[Sequence[int]]
    initial: list[Sequence[int]]
    """One per synthetic response; empty without one."""

    @property
    def differs(self) -> list[bool]:
        """Whether each synthetic response differs from the real one."""
        return [list(response) != list(self.real) for response in self.synthetic]

    @property
    def responses(self) -> list[list[Sequence[int]]]:
        """The real, synthetic and initial responses that are computed, in the order of a row."""
        synthetic = list(compress(self.synthetic, self.differs))
        return [[self.real], synthetic, [response for response in self.initial if len(response)]]


def groups_of(pairs: Sequence[Pair], *, grouped: bool) -> list[Group]:
    """Return one group per run of pairs with the same prompt and real response, or one per pair if not `grouped`."""
    if not grouped:
        return [Group(pair.prompt, pair.real, [pair.synthetic], [pair.initial]) for pair in pairs]
    runs = groupby(pairs, key=lambda pair: (list(pair.prompt), list(pair.real)))
    members = [(shared, list(run)) for shared, run in runs]
    return [Group(*shared, [pair.synthetic for pair in run], [pair.initial for pair in run]) for shared, run in members]


def sequences_of(groups: Sequence[Group]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the prompt and response of each of the R responses: all real, all synthetic, all initial ones."""
    responses = [group.responses for group in groups]
    return [
        (group.prompt, response)
        for kind in range(3)
        for group, own in zip(groups, responses, strict=True)
        for response in own[kind]
    ]


def padded_batch(pairs: Sequence[Pair], pad_token_id: int, *, grouped: bool = False) -> dict[str, Tensor]:
    """Build the padded layout of B pairs.

    Returns:
        input_ids, attention_mask: [R, L]; keep, targets, segments: [K], with `keep` indexing the
        flattened [R * L]; lengths: [R]; sides: [2, B]; perhaps initial: [B].
    """
    groups = groups_of(pairs, grouped=grouped)
    return _sequences(sequences_of(groups), pad_token_id) | _indices(groups)


def single_batch(prompt: Sequence[int], response: Sequence[int]) -> dict[str, Tensor]:
    """Build one unpadded sequence, the reference for a response's log-probability.

    Returns:
        Like `padded_batch`, with one row [1, L] and lengths [1], but without attention_mask and indices.
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


def row_spans(row: Iterable[Sequence[int]]) -> list[tuple[int, int, int, int]]:
    """Return the `spans` [R, 4] of a row.

    Args:
        row: for each prompt its tokens, then those of each of its responses; none is 0.
    """
    spans, start = [], 0
    for prompt, *responses in row:
        position = start + prompt
        for tokens in responses:
            spans.append((start, prompt, position, tokens))
            position += tokens
        start = position
    return spans


def shared_prefix_batch(pairs: Sequence[Pair], *, grouped: bool = False) -> dict[str, Tensor]:
    """Build the shared-prefix layout of B pairs with T tokens in total.

    Returns:
        input_ids, position_ids: [1, T], with every response positioned directly after the prompt; spans: [R, 4] in the
        row's order, for each response the start and length of its prompt, then its own start and length; keep,
        targets, segments: [K]; lengths: [R]; sides: [2, B]; perhaps initial: [B].
    """
    groups = groups_of(pairs, grouped=grouped)
    rows = [[group.prompt, *chain(*group.responses)] for group in groups]
    spans = row_spans([len(part) for part in row] for row in rows)
    span = iter(spans)
    tokens, positions = [], []
    keep: list[list[Tensor]] = [[], [], []]  # of real, synthetic and initial responses
    targets: list[list[Tensor]] = [[], [], []]
    for group in groups:
        tokens.append(torch.as_tensor(group.prompt, dtype=torch.long))
        positions.append(torch.arange(len(group.prompt)))
        for kind, responses in enumerate(group.responses):
            for response in responses:
                start, prompt, first, length = next(span)
                tokens.append(torch.as_tensor(response, dtype=torch.long))
                positions.append(torch.arange(prompt, prompt + length))
                before = torch.arange(first - 1, first + length - 1)
                before[:1] = start + prompt - 1  # the prompt's last position predicts every response's first token
                keep[kind].append(before)
                targets[kind].append(tokens[-1])
    chosen = [*chain(*targets)]
    lengths = torch.tensor([len(response) for response in chosen])
    return {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat(positions)[None],
        "spans": torch.tensor(spans),
        "keep": torch.cat([*chain(*keep)]),
        "targets": torch.cat(chosen),
        "segments": torch.arange(lengths.numel()).repeat_interleave(lengths),
        "lengths": lengths,
        **_indices(groups),
    }


def _indices(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return `sides` and, if a pair has an initial response, `initial`."""
    sizes = torch.tensor([len(group.synthetic) for group in groups])
    real = torch.arange(len(groups)).repeat_interleave(sizes)
    differs = torch.tensor([different for group in groups for different in group.differs])
    synthetic = (len(groups) + differs.cumsum(0) - 1).where(differs, real)
    indices = {"sides": torch.stack([real, synthetic])}
    has_initial = torch.tensor([len(response) > 0 for group in groups for response in group.initial])
    if has_initial.any():
        number = len(groups) + differs.sum() + has_initial.cumsum(0) - 1
        indices["initial"] = number.where(has_initial, -1)
    return indices


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

    def __init__(self, tokenizer: Any, *, grouped: bool = False, **_padding: Any) -> None:
        # Axolotl passes its padding options to every collator; none applies here.
        self.shared_prefix, self.grouped = False, grouped
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch, `pairs` [B], their indices, and `responses` [R], the storage indices of the opponent's
        log-probs."""
        pairs = [Pair.of(row) for row in rows]
        if self.shared_prefix:
            batch = shared_prefix_batch(pairs, grouped=self.grouped)
        else:
            batch = padded_batch(pairs, self.pad_token_id, grouped=self.grouped)
        batch["responses"] = torch.zeros_like(batch["lengths"])  # initial ones have none: any index will do
        batch["pairs"] = torch.tensor([row["index"] for row in rows])
        # Up to rounding, the pairs of a group store the same value for their real response, and for synthetic ones that
        # equal it: any of them will do.
        batch["responses"][batch["sides"]] = response_indices(batch["pairs"])
        return batch
