"""The opponent's log-probs on disk: complete, tied to their pairs and weights, and resumable after a kill."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spin_plugin.console import SpinError
from spin_plugin.data.order import Limits, Sizes
from spin_plugin.model.layout import response_indices
from spin_plugin.opponent.scoring import (
    SCORING_FACTOR,
    fill,
    scoring_batches,
    scoring_rounds,
    scoring_tokens,
    unscored,
)
from spin_plugin.opponent.store import MIN_PART, PARTS, OpponentStore

PAIRS = 5 * MIN_PART + 3


@pytest.fixture
def store(tmp_path: Path) -> OpponentStore:
    return OpponentStore(tmp_path / "opponent-train.safetensors", 2 * PAIRS, "weights/pairs")


LENGTHS = torch.randint(5, 900, (PAIRS,), generator=torch.Generator().manual_seed(0))
TRUTH = torch.stack([-LENGTHS.float(), -LENGTHS * 2.5], dim=1).flatten()


def score(indices: Tensor) -> tuple[Tensor, Tensor]:
    responses = response_indices(indices).flatten()
    return responses, TRUTH[responses]


def killed_after(rounds: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a score function that is killed after `rounds` rounds."""
    left = rounds

    def scored(indices: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return score(indices)

    return scored


def test_new_store_holds_only_nan(store: OpponentStore) -> None:
    assert store.load().isnan().all()


@pytest.mark.parametrize(("tokens", "world"), [(1, 1), (16_000, 1), (7_000, 3), (10_000_000, 2)])
def test_every_pair_is_scored_and_stored(store: OpponentStore, tokens: int, world: int) -> None:
    values = store.load()
    fill(values, store, unscored(scoring_batches(LENGTHS, tokens=tokens, world=world), values), score, write=True)
    assert torch.equal(store.load(), TRUTH)
    assert torch.equal(load_file(store.file)["logps"], TRUTH)
    assert not unscored(scoring_batches(LENGTHS, tokens=tokens, world=world), store.load())


def test_batches_by_hand() -> None:
    """Two ranks of 12 tokens: 9 and 8 go alone, 6, 5 and 4, 3 in twos; 2 is left over and joined by 3."""
    rounds = scoring_batches(torch.tensor([4, 9, 2, 6, 3, 5, 8]), tokens=12, world=2)
    assert [indices.tolist() for indices in rounds] == [[[1], [6]], [[3, 5], [0, 4]], [[4], [2]]]


def test_scoring_tokens_by_hand() -> None:
    """Micro-batches of two pairs average 24 of the 60 tokens, so the pair of 40 counts; those of four average 48."""
    lengths = torch.tensor([5, 40, 5, 5, 5])
    assert scoring_tokens(lengths, Limits(2)) == SCORING_FACTOR * 40
    assert scoring_tokens(lengths, Limits(4)) == SCORING_FACTOR * 48
    assert scoring_tokens(lengths, Limits(4, 100)) == SCORING_FACTOR * 100


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    tokens=st.integers(1, 200),
    world=st.integers(1, 5),
)
def test_batches_hold_every_pair_within_the_token_limit(lengths: list[int], tokens: int, world: int) -> None:
    rounds = scoring_batches(torch.tensor(lengths), tokens=tokens, world=world)
    assert all(indices.shape[0] == world for indices in rounds)
    assert {index for indices in rounds for index in indices.flatten().tolist()} == set(range(len(lengths)))
    assert sum(indices.numel() for indices in rounds) < len(lengths) + world, "fewer pairs than ranks are scored twice"
    for batch in (batch for indices in rounds for batch in indices.tolist()):
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


def test_rounds_of_separate_pairs_are_those_of_scoring_batches() -> None:
    sizes = Sizes(LENGTHS, LENGTHS // 2, torch.arange(PAIRS))
    rounds = scoring_rounds(sizes, tokens=16_000, world=2)
    for found, expected in zip(rounds, scoring_batches(LENGTHS, tokens=16_000, world=2), strict=True):
        assert torch.equal(found, expected)


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    tokens=st.integers(1, 300),
    world=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_rounds_split_prompts_only_above_the_token_limit(counts: list[int], tokens: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    prompts = prompts[torch.randperm(len(prompts), generator=generator)]
    shared = torch.randint(2, 40, (len(counts),), generator=generator)[prompts]
    sizes = Sizes(shared + torch.randint(1, 20, shared.shape, generator=generator), shared, prompts)
    rounds = scoring_rounds(sizes, tokens=tokens, world=world)
    assert {index for indices in rounds for index in indices.flatten().tolist()} == set(range(len(prompts)))
    most = max(1, tokens // int(sizes.tokens.max()))
    rows: Counter[int] = Counter()
    for indices in rounds:
        assert indices.shape[0] == world
        for batch in indices:
            assert len(batch) == 1 or int(sizes.tokens[batch].sum()) <= tokens
            rows.update(prompts[batch].unique().tolist())
    needed = sum(-(-count // most) for count in counts)
    sizes_of_parts = len({*counts, *range(1, most)})
    assert rows.total() < needed + world * sizes_of_parts, "the last round of a size can repeat a part for each rank"


@pytest.mark.parametrize("killed", [0, 1, 40, 150])
def test_scoring_resumes_after_the_last_stored_part(store: OpponentStore, killed: int) -> None:
    rounds = [indices[None] for indices in torch.arange(PAIRS).split(16)]
    with pytest.raises(KeyboardInterrupt):
        fill(store.load(), store, rounds, killed_after(killed), write=True)
    values = store.load()
    stored = int((~values.isnan()).sum())
    assert killed * 32 - store.part < stored <= killed * 32
    left = unscored(rounds, values)
    assert len(left) == len(rounds) - stored // 32
    fill(values, store, left, score, write=True)
    assert torch.equal(store.load(), TRUTH)


def test_interval_between_writes(tmp_path: Path) -> None:
    assert OpponentStore(tmp_path / "few", 100, "").part == MIN_PART
    assert OpponentStore(tmp_path / "many", 1_000_000, "").part == 1_000_000 // PARTS


def test_other_ranks_store_nothing(store: OpponentStore) -> None:
    values = store.load()
    fill(values, store, scoring_batches(LENGTHS, tokens=60_000, world=2), score, write=False)
    assert torch.equal(values, TRUTH)
    assert not store.file.exists()


def test_values_of_other_weights_or_pairs_are_never_used(store: OpponentStore) -> None:
    store.save(TRUTH)
    for other in (
        OpponentStore(store.file, 2 * PAIRS, "other weights/pairs"),
        OpponentStore(store.file, 2 * PAIRS, "weights/other pairs"),
        OpponentStore(store.file, 2 * PAIRS - 2, "weights/pairs"),
    ):
        assert other.load().isnan().all()
    save_file({"logps": TRUTH}, store.file)
    assert store.load().isnan().all(), "no key"


@pytest.mark.parametrize("damage", [b"", b"garbage", None, "truncated"])
def test_damaged_values_are_never_used(store: OpponentStore, damage: bytes | str | None) -> None:
    store.save(TRUTH)
    intact = store.file.read_bytes()
    if damage is None:
        store.file.unlink()
    else:
        store.file.write_bytes(intact[:-5] if isinstance(damage, str) else damage)
    assert store.load().isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logps_that_are_not_finite_are_refused_and_not_stored(store: OpponentStore, value: float) -> None:
    def broken(indices: Tensor) -> tuple[Tensor, Tensor]:
        responses = response_indices(indices).flatten()
        return responses, torch.full((len(responses),), value)

    with pytest.raises(SpinError, match="not finite"):
        fill(store.load(), store, scoring_batches(LENGTHS, tokens=60_000, world=1), broken, write=True)
    assert not store.file.exists()


def test_key_depends_on_the_weights_and_the_content_of_the_pairs(tmp_path: Path) -> None:
    from spin_plugin.training.prepare import PairsOnDisk

    def key(weights: str, content: bytes, directory: str) -> str:
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / "train.arrow").write_bytes(content)
        files = {"train": tmp_path / directory / "opponent-train.safetensors"}
        return PairsOnDisk(train=None, eval=None, stats={}, opponent_files=files, weights=weights).opponent_key("train")

    assert key("w", b"pairs", "here") == key("w", b"pairs", "there"), "the path does not matter"
    assert len({key("w", b"pairs", "a"), key("v", b"pairs", "b"), key("w", b"other", "c")}) == 3
