"""The order of the pairs: random, seeded, complete and balanced within each step."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from spin_plugin.data.order import BalancedSampler, balanced, pairs_counted, steps_in_epoch


def test_balanced_by_hand() -> None:
    """Lengths 8 … 1 in two groups of four: 8, 5, 4, 1 and 7, 6, 3, 2, with 18 tokens each."""
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    order = balanced(torch.arange(8), lengths, groups=2)
    assert lengths[order].tolist() == [8, 5, 4, 1, 7, 6, 3, 2]


def test_epoch_contains_every_pair_once_and_steps_keep_their_pairs() -> None:
    lengths = torch.randint(10, 1000, (103,), generator=torch.Generator().manual_seed(0))
    plain = BalancedSampler(lengths, micro_batch=16, groups=1, seed=3)
    grouped = BalancedSampler(lengths, micro_batch=4, groups=4, seed=3)
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
    ours = spread(list(BalancedSampler(lengths, micro_batch=8, groups=8, seed=2)))
    assert ours - 1 < (spread(random) - 1) / 3


def test_epochs_differ_and_are_reproducible() -> None:
    lengths = torch.arange(50)
    sampler, again = (BalancedSampler(lengths, micro_batch=5, groups=2, seed=9) for _ in range(2))
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
