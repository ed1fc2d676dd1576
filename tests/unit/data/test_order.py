"""The order of the pairs: random, seeded, complete and balanced within each step."""

import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from spin_plugin.data.order import BalancedSampler, Sizes, balanced, pair_sizes, pairs_counted, shuffled, steps_in_epoch


def apart(lengths: Tensor) -> Sizes:
    """Return sizes of pairs that are not grouped."""
    return Sizes(lengths, lengths // 2, torch.arange(len(lengths)))


def random_groups(seed: int) -> Sizes:
    """Return sizes of 60 prompts with one to four pairs each, which do not stand together."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.arange(60).repeat_interleave(torch.randint(1, 5, (60,), generator=generator))
    prompts = prompts[torch.randperm(len(prompts), generator=generator)]
    shared = torch.randint(10, 500, (60,), generator=generator)[prompts]
    return Sizes(shared + torch.randint(1, 300, shared.shape, generator=generator), shared, prompts)


def test_balanced_by_hand() -> None:
    """Lengths 8 … 1 in two groups of four: 8, 5, 4, 1 and 7, 6, 3, 2, with 18 tokens each."""
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    order = balanced(torch.arange(8), apart(lengths), groups=2)
    assert lengths[order].tolist() == [8, 5, 4, 1, 7, 6, 3, 2]


def test_epoch_contains_every_pair_once_and_steps_keep_their_pairs() -> None:
    lengths = torch.randint(10, 1000, (103,), generator=torch.Generator().manual_seed(0))
    plain = BalancedSampler(apart(lengths), micro_batch=16, groups=1, seed=3)
    grouped = BalancedSampler(apart(lengths), micro_batch=4, groups=4, seed=3)
    one, other = list(plain), list(grouped)
    assert sorted(one) == sorted(other) == list(range(103))
    assert len(grouped) == 103
    for start in range(0, 103, 16):
        assert set(one[start : start + 16]) == set(other[start : start + 16])


def test_groups_are_more_even_than_in_random_order() -> None:
    lengths = torch.randn(4096, generator=torch.Generator().manual_seed(1)).mul(0.6).exp().mul(500).long()

    def spread(order: list[int]) -> float:
        tokens = lengths[torch.tensor(order)].view(-1, 8, 8).sum(-1).float()
        return (tokens.max(1).values / tokens.mean(1)).mean().item()

    random = torch.randperm(4096, generator=torch.Generator().manual_seed(2)).tolist()
    ours = spread(list(BalancedSampler(apart(lengths), micro_batch=8, groups=8, seed=2)))
    assert ours - 1 < (spread(random) - 1) / 3


def test_epochs_differ_and_are_reproducible() -> None:
    lengths = torch.arange(50)
    sampler, again = (BalancedSampler(apart(lengths), micro_batch=5, groups=2, seed=9) for _ in range(2))
    first = list(sampler)
    sampler.set_epoch(1)
    again.set_epoch(1)
    assert list(sampler) != first
    assert list(sampler) == list(again)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_every_pair_counts_once_in_accelerates_batches(ranks: int, micro_batch: int) -> None:
    """For any number of pairs, the pairs that fill up the last batches come last in them and are not counted."""
    for pairs in range(ranks, 40):
        batches = BatchSampler(SequentialSampler(range(pairs)), micro_batch, drop_last=False)
        seen = []
        for rank in range(ranks):
            assigned = list(BatchSamplerShard(batches, ranks, rank)) if ranks > 1 else list(batches)
            for accumulation in (1, 2, 3):
                steps = steps_in_epoch(pairs, micro_batch=micro_batch, ranks=ranks, accumulation=accumulation)
                assert steps == -(-len(assigned) // accumulation)
            for number, batch in enumerate(assigned):
                seen += batch[: pairs_counted(pairs, number=number, micro_batch=micro_batch, rank=rank, ranks=ranks)]
        assert sorted(seen) == list(range(pairs))


# --- pairs of one prompt together ----------------------------------------------------------------


def test_balanced_groups_by_hand() -> None:
    """Prompts with two pairs have rows of 42 and 22 tokens, single pairs 30 and 10; 42 + 10 equals 30 + 22."""
    tokens, shared = torch.tensor([35, 37, 15, 17, 30, 10]), torch.tensor([30, 30, 10, 10, 20, 5])
    sizes = Sizes(tokens, shared, torch.tensor([4, 4, 1, 1, 2, 3]))
    assert balanced(torch.arange(6), sizes, groups=2).tolist() == [0, 1, 5, 4, 2, 3]


def test_prompt_that_fits_nowhere_is_split() -> None:
    sizes = Sizes(torch.full((6,), 10), torch.full((6,), 5), torch.tensor([1, 1, 2, 2, 3, 3]))
    assert balanced(torch.arange(6), sizes, groups=2).tolist() == [0, 1, 4, 2, 3, 5]


@pytest.mark.parametrize("grouped", [False, True])
def test_sizes_of_a_dataset(grouped: bool) -> None:
    pairs = {"length": [9, 8, 12], "example": [5, 3, 5], "synthetic": [[1, 2], [1], [1, 2, 3, 4, 5]]}
    sizes = pair_sizes(Dataset(pa.table(pairs)), grouped=grouped)
    assert sizes.tokens.tolist() == [9, 8, 12]
    assert sizes.shared.tolist() == [7, 7, 7]
    assert sizes.prompts.tolist() == ([5, 3, 5] if grouped else [0, 1, 2])


def old_order(lengths: Tensor, *, micro_batch: int, groups: int, seed: int) -> list[int]:
    """The order before pairs could be grouped: a permutation, balanced greedily pair by pair."""
    size, order = micro_batch * groups, []
    for chunk in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).split(size):
        filled: list[list[int]] = [[] for _ in range(groups)]
        if len(chunk) < size:
            order += chunk.tolist()
            continue
        for place in torch.argsort(lengths[chunk], descending=True, stable=True).tolist():
            space = [group for group in filled if len(group) < micro_batch]
            min(space, key=lambda group: sum(int(lengths[pair]) for pair in group)).append(int(chunk[place]))
        order += [pair for group in filled for pair in group]
    return order


@pytest.mark.parametrize(("micro_batch", "groups"), [(4, 4), (1, 8), (16, 1), (3, 2)])
def test_order_of_separate_pairs_is_the_one_before_grouping(micro_batch: int, groups: int) -> None:
    lengths = torch.randint(10, 60, (103,), generator=torch.Generator().manual_seed(0))
    found = list(BalancedSampler(apart(lengths), micro_batch=micro_batch, groups=groups, seed=3))
    assert found == old_order(lengths, micro_batch=micro_batch, groups=groups, seed=3)


@pytest.mark.parametrize("seed", range(5))
def test_shuffle_is_over_prompts(seed: int) -> None:
    prompts = random_groups(seed).prompts
    order = shuffled(prompts, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(len(prompts)))
    runs = prompts[order].unique_consecutive()
    assert len(runs) == 60, "the pairs of a prompt stand together"
    assert not torch.equal(runs, runs.sort().values)
    for prompt in runs:
        pairs = order[prompts[order] == prompt]
        assert torch.equal(pairs, pairs.sort().values)


@pytest.mark.parametrize(("micro_batch", "groups"), [(4, 4), (8, 2), (1, 8), (2, 3), (3, 5)])
def test_grouped_steps_keep_their_pairs(micro_batch: int, groups: int) -> None:
    """And split a prompt only between steps, or if no micro-batch has space for it."""
    sizes, step = random_groups(1), micro_batch * groups
    order = torch.tensor(list(BalancedSampler(sizes, micro_batch=micro_batch, groups=groups, seed=3)))
    unbalanced = shuffled(sizes.prompts, torch.Generator().manual_seed(3))
    assert [set(chunk.tolist()) for chunk in order.split(step)] == [set(c.tolist()) for c in unbalanced.split(step)]
    if micro_batch >= 4:
        rows = sum(len(sizes.prompts[batch].unique_consecutive()) for batch in order.split(micro_batch))
        fewest = sum(len(sizes.prompts[chunk].unique()) for chunk in order.split(step))
        assert rows <= 1.15 * fewest


def test_prompts_of_equal_size_are_never_split() -> None:
    prompts = torch.arange(200) % 100
    lengths = torch.randint(10, 500, (200,), generator=torch.Generator().manual_seed(0))
    sizes = Sizes(lengths, lengths // 2, prompts)
    order = torch.tensor(list(BalancedSampler(sizes, micro_batch=4, groups=4, seed=3)))
    assert all(len(prompts[batch].unique()) == 2 for batch in order.split(4))
