"""The values in the table, from an entry of run.json."""

from typing import Any

import pytest

from spin_plugin.report.measures import GROUPS, lm_eval_measures

MEASURES = {measure.name: measure for group in GROUPS.values() for measure in group}
TRAIN = {"responses": 10, "equal": 5, "truncated": 1, "real_mean": 9.0, "synthetic_mean": 4.0, "pairs": 9}
NEWEST = {"responses": 4, "equal": 3, "truncated": 0, "synthetic_mean": 3.0, "distinct_synthetic": 2}


def test_shares_are_those_of_the_iterations_own_responses_where_they_are_recorded() -> None:
    old, new = ({"pairs": {"train": TRAIN | more}} for more in ({}, {"newest": NEWEST}))
    names = ("equal", "truncated", "synthetic tokens", "real tokens", "distinct", "pairs")
    assert [MEASURES[name].value(old) for name in names] == [0.5, 0.1, 4.0, 9.0, None, 9]
    assert [MEASURES[name].value(new) for name in names] == [0.75, 0.0, 3.0, 9.0, 0.5, 9]


def test_names_are_unique_and_nothing_is_read_from_an_empty_entry() -> None:
    assert len(MEASURES) == sum(map(len, GROUPS.values()))
    assert [measure.name for measure in MEASURES.values() if measure.value({}) is not None] == []


@pytest.mark.parametrize(
    ("entry", "time"),
    [
        ({"stages": {"train": {"seconds": 7384.0, "tokens": 1}}}, "2 h 03 min"),
        ({"stages": {"train": {"seconds": 59.9, "tokens": 1}}}, "1 min 00 s"),
        ({"metrics": {"train_runtime": 8.25}}, "8.2 s"),
    ],
)
def test_times(entry: dict[str, Any], time: str) -> None:
    measure = MEASURES["train"]
    value = measure.value(entry)
    assert isinstance(value, float)
    assert measure.show(value).replace("\u00a0", " ") == time


def test_speed_needs_seconds() -> None:
    speed = MEASURES["train, speed"]
    assert speed.value({"stages": {"train": {"seconds": 2.0, "tokens": 100}}}) == 50
    assert speed.value({"stages": {"train": {"seconds": 0.0, "tokens": 100}}}) is None


def test_every_benchmark_of_any_iteration_is_a_row() -> None:
    entries: list[dict[str, Any]] = [{"lm_eval": {"a/acc": 0.5}}, {}, {"lm_eval": {"b/em": 0.25}}]
    rows = {measure.name: [measure.value(entry) for entry in entries] for measure in lm_eval_measures(entries)}
    assert rows == {"a/acc": [0.5, None, None], "b/em": [None, None, 0.25]}
