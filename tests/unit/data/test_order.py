"""The order of the pairs: random, seeded, complete, in steps of fixed size and balanced micro-batches."""

import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from spin_plugin.data.order import (
    Limits,
    PromptSampler,
    SeededSampler,
    Sizes,
    micro_batches,
    pair_sizes,
    pairs_counted,
    shuffled,
)
from spin_plugin.data.steps import StepDataset, StepSampler, steps_in_epoch, unchanged


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


def items(sizes: Sizes, limits: Limits, *, accumulation: int = 1, ranks: int = 1, seed: int = 3) -> list[StepSampler]:
    """Return the sampler of every rank."""
    return [
        StepSampler(
            PromptSampler(sizes.prompts, seed=seed),
            sizes,
            limits,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            balance=True,
        )
        for rank in range(ranks)
    ]


def steps_of(samplers: list[StepSampler]) -> list[list[list[list[int]]]]:
    """Return the pairs that count, by step, rank and micro-batch; check that all ranks have equally many of these."""
    steps: list[list[list[list[int]]]] = []
    for sampler in samplers:
        found = list(sampler)
        assert len(found) == len(sampler)
        for number, first in enumerate(range(0, len(found), sampler.accumulation)):
            step = found[first : first + sampler.accumulation]
            assert step[-1].micro_batches, "the optimizer steps after the last item"
            batches = [batch for item in step for batch in item.micro_batches]
            if sampler.rank == 0:
                steps.append([])
            steps[number].append([batch.pairs if batch.counts else [] for batch in batches])
            assert {item.step_pairs for item in step} == {step[0].step_pairs}
    for ranks in steps:
        assert len({len(batches) for batches in ranks}) == 1
    return steps


def test_balanced_by_hand() -> None:
    """Lengths 8 … 1 in two micro-batches of four: 8, 5, 4, 1 and 7, 6, 3, 2, with 18 tokens each."""
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    found = micro_batches([*range(8)], apart(lengths), Limits(4), ranks=1, balance=True)
    assert [lengths[batch].tolist() for batch in found] == [[8, 5, 4, 1], [7, 6, 3, 2]]


@pytest.mark.parametrize("tokens", [None, 100, 700, 5000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("pairs", "accumulation"), [(1, 4), (4, 2), (16, 1), (3, 3)])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_pair_counts_once_and_steps_are_exact(
    grouped: bool, pairs: int, accumulation: int, ranks: int, tokens: int | None
) -> None:
    """For any limits, a step is the next `pairs_per_step` pairs of the order, the last step what is left."""
    sizes = random_groups(2) if grouped else apart(random_groups(2).tokens)
    samplers = items(sizes, Limits(pairs, tokens), accumulation=accumulation, ranks=ranks)
    steps, size = steps_of(samplers), pairs * accumulation * ranks
    order = list(PromptSampler(sizes.prompts, seed=3))
    assert len(steps) == steps_in_epoch(len(order), size)
    for number, step in enumerate(steps):
        counted = [pair for rank in step for batch in rank for pair in batch]
        assert sorted(counted) == sorted(order[number * size : (number + 1) * size])
    first = [item.step_pairs for item in samplers[0]][:: samplers[0].accumulation]
    assert first == [min(size, len(order) - number * size) for number in range(len(steps))]


def test_micro_batches_are_more_even_than_in_random_order() -> None:
    lengths = torch.randn(4096, generator=torch.Generator().manual_seed(1)).mul(0.6).exp().mul(500).long()

    def spread(tokens: Tensor) -> float:
        return (tokens.max(1).values / tokens.mean(1)).mean().item()

    random = lengths[torch.randperm(4096, generator=torch.Generator().manual_seed(2))].view(-1, 8, 8).sum(-1).float()
    steps = steps_of(items(apart(lengths), Limits(8), accumulation=8))
    ours = torch.tensor([[int(lengths[batch].sum()) for batch in rank] for (rank,) in steps]).float()
    assert spread(ours) - 1 < (spread(random) - 1) / 3


def test_epochs_differ_and_are_reproducible() -> None:
    sampler, again = (PromptSampler(torch.arange(50), seed=9) for _ in range(2))
    first = list(sampler)
    sampler.set_epoch(1)
    again.set_epoch(1)
    assert list(sampler) != first
    assert list(sampler) == list(again)


def test_epoch_and_skipped_items_reach_the_sampler() -> None:
    """As in transformers' loop: the data loader sets the epoch, and a resume skips items."""
    sizes = random_groups(0)
    pairs = Dataset.from_dict({"index": list(range(len(sizes.tokens)))})

    def loader() -> DataLoaderShard:
        (sampler,) = items(sizes, Limits(4), accumulation=2)
        dataset = StepDataset(pairs, lambda rows: {"pairs": [row["index"] for row in rows]})
        return DataLoaderShard(dataset, batch_sampler=sampler, collate_fn=unchanged)

    epochs = []
    for epoch in (0, 1):
        entire, skipped = loader(), skip_first_batches(loader(), 6)
        found = []
        for each in (entire, skipped):
            each.set_epoch(epoch)
            found.append([batch["pairs"] for item in each for batch in item["micro_batches"]])
        assert found[1] == found[0][-len(found[1]) :]
        assert len(entire) - len(skipped) == 6
        epochs.append(found[0])
        assert sorted(pair for batch in found[0] for pair in batch) == list(range(len(pairs)))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_every_pair_counts_once_in_accelerates_batches(ranks: int, micro_batch: int) -> None:
    """For any number of held-out pairs, those that fill up the last batches come last in them and are not counted."""
    for pairs in range(ranks, 40):
        batches = BatchSampler(SequentialSampler(range(pairs)), micro_batch, drop_last=False)
        seen = []
        for rank in range(ranks):
            assigned = list(BatchSamplerShard(batches, ranks, rank)) if ranks > 1 else list(batches)
            for number, batch in enumerate(assigned):
                seen += batch[: pairs_counted(pairs, number=number, micro_batch=micro_batch, rank=rank, ranks=ranks)]
        assert sorted(seen) == list(range(pairs))


# --- pairs of one prompt together ----------------------------------------------------------------


def test_balanced_groups_by_hand() -> None:
    """Prompts with two pairs have rows of 42 and 22 tokens, single pairs 30 and 10; 42 + 10 equals 30 + 22."""
    tokens, shared = torch.tensor([35, 37, 15, 17, 30, 10]), torch.tensor([30, 30, 10, 10, 20, 5])
    sizes = Sizes(tokens, shared, torch.tensor([4, 4, 1, 1, 2, 3]))
    assert micro_batches([*range(6)], sizes, Limits(3), ranks=1, balance=True) == [[0, 1, 5], [4, 2, 3]]


def test_micro_batch_of_one_pair_holds_one_prompt() -> None:
    """Three prompts of two pairs: three micro-batches instead of six; on two ranks two each, so one prompt is split."""
    sizes = Sizes(torch.full((6,), 10), torch.full((6,), 5), torch.tensor([1, 1, 2, 2, 3, 3]))
    found = micro_batches([*range(6)], sizes, Limits(1), ranks=1, balance=True)
    assert found == [[0, 1], [2, 3], [4, 5]]
    (step,) = steps_of(items(sizes, Limits(1), accumulation=3, ranks=2))
    assert [len(batches) for batches in step] == [2, 2]
    assert sorted(len(batch) for batches in step for batch in batches) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("pairs", "accumulation", "ranks", "prompts"), [(1, 1, 8, 4), (1, 4, 8, 4), (2, 2, 8, 4), (4, 1, 2, 1)]
)
def test_every_rank_has_pairs_where_prompts_are_fewer(pairs: int, accumulation: int, ranks: int, prompts: int) -> None:
    """Prompts are split just enough; with whole prompts only, the last ranks would repeat a pair in vain."""
    number = pairs * accumulation * ranks
    sizes = Sizes(torch.full((number,), 10), torch.full((number,), 5), torch.arange(number) * prompts // number)
    (step,) = steps_of(items(sizes, Limits(pairs), accumulation=accumulation, ranks=ranks))
    assert all(batch for batches in step for batch in batches)
    assert {len(batches) for batches in step} == {1}


def test_order_by_length_is_the_same_after_a_resume() -> None:
    lengths = torch.randint(1, 100, (64,)).tolist()
    orders = []
    for _ in range(2):
        sampler = SeededSampler(LengthGroupedSampler(4, lengths=lengths), seed=5)
        sampler.set_epoch(1)
        orders.append(list(sampler))
        torch.rand(3)  # the global generator is elsewhere by then
    assert orders[0] == orders[1]
    sampler.set_epoch(2)
    assert list(sampler) != orders[0]


def test_tokens_by_hand() -> None:
    """Rows of 15 tokens for a prompt's two pairs, 10 for one: 30 tokens hold two prompts, 12 split each."""
    sizes = Sizes(torch.full((6,), 10), torch.full((6,), 5), torch.tensor([1, 1, 2, 2, 3, 3]))
    assert micro_batches([*range(6)], sizes, Limits(1, 30), ranks=1, balance=True) == [[0, 1, 4, 5], [2, 3]]
    assert micro_batches([*range(6)], sizes, Limits(6, 12), ranks=1, balance=True) == [[pair] for pair in range(6)]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("limit", [1, 250, 900, 4000])
def test_micro_batches_keep_within_their_tokens(limit: int, balance: bool) -> None:
    """Unless they hold a single pair; counted from the tokens of each prompt."""
    sizes = random_groups(4)
    order = shuffled(sizes.prompts, torch.Generator().manual_seed(0)).tolist()
    for batch in micro_batches(order, sizes, Limits(8, limit), ranks=2, balance=balance):
        together: dict[int, int] = {}
        for pair in batch:
            own = int(sizes.tokens[pair] - sizes.shared[pair])
            prompt = int(sizes.prompts[pair])
            together[prompt] = together.get(prompt, int(sizes.shared[pair])) + own
        assert sum(together.values()) <= limit or len(batch) == 1


def test_initial_responses_are_not_shared() -> None:
    pairs = {"length": [12, 10], "example": [5, 5], "prompt": [[1] * 3] * 2, "real": [[2] * 4] * 2}
    sizes = pair_sizes(Dataset(pa.table(pairs)), grouped=True)
    assert (sizes.tokens.tolist(), sizes.shared.tolist()) == ([12, 10], [7, 7])


@pytest.mark.parametrize("grouped", [False, True])
def test_sizes_of_a_dataset(grouped: bool) -> None:
    pairs = {
        "length": [9, 8, 12],
        "example": [5, 3, 5],
        "prompt": [[1], [1, 2], [1]],
        "real": [[1] * 6, [1] * 5, [1] * 6],
    }
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


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (1, 4), (16, 1), (3, 2)])
def test_order_of_separate_pairs_is_the_one_before_grouping(micro_batch: int, accumulation: int, ranks: int) -> None:
    """The same pairs in the same micro-batches, dealt to the ranks in turn as accelerate did."""
    lengths = torch.randint(10, 60, (103,), generator=torch.Generator().manual_seed(0))
    order = old_order(lengths, micro_batch=micro_batch, groups=accumulation * ranks, seed=3)
    batches = [order[first : first + micro_batch] for first in range(0, 103, micro_batch)]
    steps = steps_of(items(apart(lengths), Limits(micro_batch), accumulation=accumulation, ranks=ranks))
    for rank in range(ranks):
        assert [batch for step in steps for batch in step[rank] if batch] == batches[rank::ranks]


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


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 4), (8, 2), (1, 8), (2, 3), (3, 5)])
def test_prompts_are_split_between_steps_only(micro_batch: int, accumulation: int) -> None:
    sizes = random_groups(1)
    for (batches,) in steps_of(items(sizes, Limits(micro_batch), accumulation=accumulation)):
        prompts = [prompt for batch in batches for prompt in sizes.prompts[batch].unique().tolist()]
        assert len(prompts) == len(set(prompts))
        assert len(batches) <= accumulation
        assert max(map(len, batches)) < micro_batch + 4, "rounded up to whole prompts"
