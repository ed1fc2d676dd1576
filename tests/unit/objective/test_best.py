"""Which iteration is best, and since when none has improved: from entries of run.json."""

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from spin_plugin.objective.best import START, measured
from spin_plugin.objective.decline import compare


def checked(values: Sequence[float], width: float, start: float = -1.0) -> list[dict[str, Any]]:
    """Return entries whose held-out log-prob has these values, each change give or take `width`."""
    entries = []
    for before, after in zip((start, *values), values, strict=False):
        interval = [after - before - width, after - before + width]
        check = {"prompts": 40, "before": before, "after": after, "difference": after - before, "interval": interval}
        entries.append({"held_out": check})
    return entries


def scored(*values: float | None, metric: str = "task/acc") -> list[dict[str, Any]]:
    """Return entries with these scores of lm-eval; None: it was not configured."""
    return [{} if value is None else {"lm_eval": {metric: value}} for value in values]


@pytest.mark.parametrize(
    ("values", "width", "best", "improvement"),
    [
        ([-0.9, -0.8, -0.7], 0.05, 2, (2, 0)),  # every iteration improves
        ([-0.9, -0.95, -0.97], 0.05, 0, (0, 2)),
        ([-0.9, -0.89, -0.88], 0.05, 2, (0, 2)),  # better, but not beyond noise: best, no improvement
        ([-0.98, -0.96, -0.94, -0.91], 0.02, 3, (3, 0)),  # small steps that add up, while their noise does, too
        ([-1.2, -1.1, -1.0], 0.05, 2, (START, 3)),  # nothing is better than the start
        ([-0.9, -0.9], 0.0, 0, (0, 1)),  # of equal ones the earlier
    ],
)
def test_best_and_last_improvement(values: list[float], width: float, best: int, improvement: tuple[int, int]) -> None:
    found = measured(checked(values, width), "held_out")
    assert list(found.values) == [START, *range(len(values))]
    assert found.best() == best
    assert found.last_improvement() == improvement


def test_scores_without_intervals_are_compared_as_they_are() -> None:
    found = measured(scored(0.5, 0.52, None, 0.51), "task/acc")
    assert found.values == {0: 0.5, 1: 0.52, 3: 0.51}
    assert found.best() == 1
    assert found.last_improvement() == (1, 1)
    assert not found.worse_than_start(3), "the start was not measured"


def test_lower_is_better_where_lm_eval_says_so() -> None:
    entries = scored(9.0, 7.0, 8.0, metric="mine/wer")
    assert measured(entries, "mine/wer").best() == 0
    falling = [entry | {"lower_is_better": ["mine/wer"]} for entry in entries]
    found = measured(falling, "mine/wer")
    assert found.best() == 1
    assert found.last_improvement() == (1, 1)
    assert measured(falling, "mine/acc").best() is None


def test_iterations_that_are_left_out_are_best_only_if_no_other_is() -> None:
    found = measured(checked([-0.9, -0.8, -0.85], 0.01), "held_out")
    assert found.best([1]) == 2
    assert found.best([0, 1, 2]) == 1


@pytest.mark.parametrize(("after", "worse"), [(-1.2, True), (-1.05, False), (-0.9, False)])
def test_worse_than_the_start_beyond_noise(after: float, worse: bool) -> None:
    assert measured(checked([after], 0.1), "held_out").worse_than_start(0) is worse
    assert measured(checked([-0.5, after], 0.05), "held_out").worse_than_start(1) is worse


def test_negligible_loss_is_not_worse_than_the_start() -> None:
    assert not measured(checked([-1.004], 0.001), "held_out").worse_than_start(0)
    assert measured(checked([-1.006], 0.001), "held_out").worse_than_start(0)


def test_noise_over_several_iterations_is_bounded_by_the_sum() -> None:
    """On random walks of prompts, the half-width of a direct comparison is never larger."""
    draw = random.Random(0)
    for _ in range(20):
        models = [torch.zeros(40, dtype=torch.float64)]
        for _ in range(4):
            models.append(models[-1] + torch.tensor([draw.gauss(0, 1) for _ in range(40)]))
        steps = [{"held_out": compare(old, new).as_dict()} for old, new in pairwise(models)]
        low, high = compare(models[0], models[-1]).interval
        found = measured(steps, "held_out")
        assert (high - low) / 2 <= found.noise_between(START, 3)
        assert found.gain(START, 3) == pytest.approx(float((models[-1] - models[0]).mean()))


def test_changes_count_and_not_means_over_other_prompts() -> None:
    """Iteration 1 has lost prompts, so its mean is above that of iteration 0, but it made each prompt worse."""
    better, worse = (checked([after], 0.01, start)[0] for start, after in ((-1.0, -0.95), (-0.9, -0.92)))
    found = measured([better, worse], "held_out")
    assert found.values == pytest.approx({START: -1.0, 0: -0.95, 1: -0.97})
    assert found.best() == 0
    assert found.last_improvement() == (0, 1)


def test_count_begins_anew_after_a_change_that_was_not_measured() -> None:
    """Another judge has another scale."""
    first, second = checked([0.2, 0.3], 0.01, start=0.1), checked([0.8, 0.9], 0.01, start=0.85)
    found = measured([*first, {}, *second], "held_out")
    assert found.values == pytest.approx({2: 0.85, 3: 0.8, 4: 0.9})
    assert found.best() == 4
    assert found.last_improvement() == (4, 0)
    assert not found.worse_than_start(3)


def test_slow_reference_agrees() -> None:
    """The same rules, written out over all iterations, on random values and noise."""
    draw = random.Random(1)
    for _ in range(200):
        values = [round(draw.gauss(-1, 0.1) * 64) / 64 for _ in range(draw.randint(1, 6))]  # sums are exact
        width = draw.choice([0.0, 0.0531, 0.2131])  # no ties
        found = measured(checked(values, width), "held_out")
        assert found.best() == values.index(max(values))
        assert found.last_improvement() == slow_improvement([-1.0, *values], width)


def slow_improvement(models: Iterable[float], width: float) -> tuple[int, int]:
    models = list(models)
    reference = 0
    for place, value in enumerate(models):
        if value - models[reference] > sum([width] * (place - reference)) + 1e-12:
            reference = place
    return reference - 1, len(models) - 1 - reference
