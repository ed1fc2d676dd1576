"""What an iteration changed, measured on held-out prompts."""

import json
import random
import statistics

import pytest
import torch
from scipy.stats import bootstrap, ttest_1samp

from spin_plugin.objective.decline import Comparison, compare, divergence, read_check, row_means

# --- held-out prompts --------------------------------------------------------------------------


def reference(before: list[float], after: list[float], tokens: list[int]) -> Comparison:
    """Prompt by prompt on Python floats, with scipy's t-test."""
    first = [logp / count for logp, count in zip(before, tokens, strict=True)]
    second = [logp / count for logp, count in zip(after, tokens, strict=True)]
    differences = [new - old for old, new in zip(first, second, strict=True)]
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    mean = statistics.fmean
    return Comparison(len(tokens), mean(first), mean(second), mean(differences), (low, high))


def responses(prompts: int, change: float, noise: float, seed: int = 0) -> tuple[list[float], list[float], list[int]]:
    """Return log-probs before and after, and lengths; each token changes by `change`, give or take `noise`."""
    draw = random.Random(seed)
    tokens = [draw.randint(5, 60) for _ in range(prompts)]
    before = [-draw.random() * count for count in tokens]
    after = [old + draw.gauss(change, noise) * count for old, count in zip(before, tokens, strict=True)]
    return before, after, tokens


def compared(before: list[float], after: list[float], tokens: list[int]) -> Comparison:
    old, new = (torch.tensor(logps, dtype=torch.float64) / torch.tensor(tokens) for logps in (before, after))
    return compare(old, new)


@pytest.mark.parametrize("prompts", [2, 8, 32, 500])
def test_comparison_matches_the_reference(prompts: int) -> None:
    data = responses(prompts, -0.01, 0.1)
    fast, slow = compared(*data), reference(*data)
    assert fast.prompts == slow.prompts == prompts
    for value, expected in zip((fast.before, fast.after, fast.difference), (slow.before, slow.after, slow.difference),
                               strict=True):  # fmt: skip
        assert value == pytest.approx(expected, abs=1e-12)
    assert fast.interval == pytest.approx(slow.interval, abs=1e-9)


def test_means_of_rows_by_hand() -> None:
    values, rows = torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([9, 2, 9, 4])
    assert row_means(values, rows).tolist() == [5.0, 7.0, 2.0]


def test_interval_agrees_with_the_bootstrap() -> None:
    """Which assumes nothing about the distribution: most prompts hardly change, a few change much."""
    before, after, tokens = responses(200, 0.0, 0.02)
    after = [
        value - 0.3 * count * (place % 10 == 0) for place, (value, count) in enumerate(zip(after, tokens, strict=True))
    ]
    found = compared(before, after, tokens)
    differences = [(new - old) / count for old, new, count in zip(before, after, tokens, strict=True)]
    resampled = bootstrap((differences,), statistics.fmean, vectorized=False, n_resamples=4000, rng=0)
    assert found.interval == pytest.approx(
        resampled.confidence_interval, abs=0.1 * (found.interval[1] - found.interval[0])
    )


def test_comparison_by_hand() -> None:
    """Two prompts of 2 and 4 tokens: -1, -2 before, -2, -2.5 after; differences -1 and -0.5; t(0.975, 1) = 12.706."""
    found = compared([-2, -8], [-4, -10], [2, 4])
    assert (found.before, found.after, found.difference) == (-1.5, -2.25, -0.75)
    assert found.interval == pytest.approx((-0.75 - 12.706 * 0.25, -0.75 + 12.706 * 0.25), abs=1e-3)
    assert not found.worse


def test_unchanged_model_is_not_worse() -> None:
    before, _, tokens = responses(40, 0, 0)
    found = compared(before, before, tokens)
    assert (found.difference, found.interval) == (0, (0, 0))
    assert not found.worse


@pytest.mark.parametrize(("change", "worse"), [(-0.08, True), (0.08, False), (0.0, False)])
def test_only_a_fall_beyond_noise_is_worse(change: float, worse: bool) -> None:
    """-0.08 is the collapse of a 135M model, from -1.3 to -4.2 over 37 tokens; 32 prompts with twice that as noise."""
    assert compared(*responses(32, change, 0.16, seed=1)).worse is worse


def test_noise_is_rarely_taken_for_a_fall() -> None:
    """One side of a 95% interval: 2.5% of unchanged models, 10 of 400."""
    wrong = sum(compared(*responses(32, 0.0, 0.1, seed=seed)).worse for seed in range(400))
    assert 1 <= wrong <= 22


def test_stored_comparison_is_read_again() -> None:
    found = compared(*responses(32, -0.1, 0.1))
    stored = json.loads(json.dumps({"iteration": 0, "held_out": found.as_dict()}))
    assert stored["held_out"].keys() == {"prompts", "before", "after", "difference", "interval", "worse"}
    assert stored["held_out"]["worse"] is True
    assert read_check(stored, "held_out") == found
    assert read_check({"iteration": 0}, "held_out") is None


def test_summary_shows_signs_and_interval() -> None:
    found = Comparison(64, -0.412, -0.398, 0.014, (0.009, 0.019))
    expected = "−0.4120 → −0.3980 nats per token (+0.0140, 95% interval +0.0090…+0.0190, 64 prompts)"
    assert found.summary("nats per token") == expected


def test_turns_of_a_row_count_once() -> None:
    """By hand: rows with means 1, 2 and 6 of their turns' differences."""
    before, after = torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, 2.0, 6.0])
    found = compare(before, after, torch.tensor([7, 7, 7, 3, 4]))
    alone = compare(torch.zeros(3), torch.tensor([1.0, 2.0, 6.0]))
    assert (found.difference, found.interval) == (alone.difference, alone.interval) == (3.0, alone.interval)
    assert found.prompts == 5


def test_a_negligible_fall_is_not_worse() -> None:
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.001
    for fall, worse in ((0.004, False), (0.006, True)):
        found = compare(torch.zeros(2000), noise - fall)
        assert found.interval[1] < 0
        assert found.worse is worse


def test_divergence_by_hand() -> None:
    """Two responses of 2 and 6 tokens, less likely by 1 and 3 nats: 4 nats in 8 tokens."""
    assert divergence(torch.tensor([-2.0, -6.0]), torch.tensor([-3.0, -9.0]), torch.tensor([2, 6])) == 0.5


def test_divergence_is_the_kl_of_two_known_distributions() -> None:
    """Responses of independent tokens sampled from p_0: their number is the only source of error."""
    draw = torch.Generator().manual_seed(0)
    first, trained = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(first, 20_000 * 5, replacement=True, generator=draw).view(-1, 5)
    logps = [model.log()[tokens].sum(1) for model in (first, trained)]
    exact = float((first * (first / trained).log()).sum())
    assert divergence(*logps, torch.full((20_000,), 5)) == pytest.approx(exact, abs=0.01)
    sharper = torch.multinomial(first**4, 20_000 * 5, replacement=True, generator=draw).view(-1, 5)
    logps = [model.log()[sharper].sum(1) for model in (first, trained)]
    assert divergence(*logps, torch.full((20_000,), 5)) > exact + 0.1, "temperature 1/4: not p_0's responses"
