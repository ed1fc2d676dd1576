"""Scores in the pairs and their key, and the comparison of one opponent's scores with its predecessor's."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from spin_plugin.args import JudgeArgs, SpinArgs, StopArgs
from spin_plugin.console import SpinError
from spin_plugin.data.pairs import JudgeStats, read_stats
from spin_plugin.data.real import Real
from spin_plugin.data.table import open_table
from spin_plugin.generation.job import Job
from spin_plugin.generation.shards import Shards
from spin_plugin.judge.verdicts import Scores
from spin_plugin.objective.decline import read_check
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState
from spin_plugin.run.stop import end_if_stopped
from spin_plugin.training.judged import Judged, compare_with_previous, require_loadable
from spin_plugin.training.prepare import _write_pairs

PROMPTS, END = 10, 1
# Two samples for each prompt of either split, those of training first.
RESPONSES = [(split, example) for split in ("train", "eval") for example in range(PROMPTS) for _ in range(2)]


def make_run(directory: Path, iterations: int = 2) -> RunDir:
    """All but the last iteration are finished."""
    run = RunDir(directory)
    for number in range(iterations):
        shards = Shards(run.iteration(number).synthetic)
        shards.prepare(Job(number, {}, None, "weights", {}, len(RESPONSES), "requests"))
        responses = [
            {"split": split, "example": example, "tokens": [50 + place, END], "finish": "stop", "stop": END}
            for place, (split, example) in enumerate(RESPONSES)
        ]
        shards.write(0, responses)
    run.write_state(RunState({}, [{"iteration": number, "pairs": {}} for number in range(iterations - 1)]))
    return run


def held_out(*scores: float | None) -> Scores:
    """Return the scores of an iteration whose k-th held-out response has the k-th score, repeatedly."""
    return [1.0] * (2 * PROMPTS) + [scores[place % len(scores)] for place in range(2 * PROMPTS)]


def compared(run: RunDir, before: Scores | None, after: Scores, **options: Any) -> Any:
    judged = Judged({0: before or after, 1: after}, 1.0, before)
    compare_with_previous(run, 1, judged, SpinArgs(stop=options.pop("stop", StopArgs())), **{"again": False} | options)
    state = run.read_state()
    assert state is not None
    return state.finished[0]


# --- pairs -------------------------------------------------------------------------------------


def test_right_training_responses_are_left_out_of_the_pairs(tmp_path: Path) -> None:
    """By the position of their scores, in both iterations; held-out pairs stay."""
    run = make_run(tmp_path)
    rows = {"prompt": [[9, example] for example in range(PROMPTS)], "real": [[7, END]] * PROMPTS}
    real = Real(Dataset.from_dict(rows), Dataset.from_dict(rows), [END])
    zero: Scores = [0.0] * len(RESPONSES)
    scores = {0: [*zero[:3], 1.0, *zero[4:]], 1: [None, 0.75, 0.5, *zero[3:-1], 1.0]}
    written = tmp_path / "pairs"
    written.mkdir()
    _write_pairs(run, SpinArgs(), 100, real, range(2), {}, Judged(scores, 0.75, None), written)
    train, kept = open_table(written / "train.arrow"), open_table(written / "eval.arrow")
    found = {(number, row[0] - 50) for number, row in zip(train["iteration"], train["synthetic"], strict=True)}
    assert found == {(number, place) for number in (0, 1) for place in range(20)} - {(0, 3), (1, 1)}
    assert len(kept) == 20
    stats = read_stats(written / "stats.json")
    assert stats["train"].judge == JudgeStats(judged=39, right=2, unjudged=1, mean=pytest.approx(2.25 / 39))
    assert stats["eval"].judge == JudgeStats(judged=20, right=1, mean=pytest.approx(0.05))
    with pytest.raises(ValueError, match="shorter"):
        _write_pairs(run, SpinArgs(), 100, real, range(2), {}, Judged({0: zero, 1: zero[:-1]}, 0.75, None), written)


def test_key_of_the_pairs_is_every_score_and_the_threshold() -> None:
    scores: dict[int, Scores] = {0: [0.5, None], 1: [1.0]}
    key = Judged(scores, 0.5, None).key
    assert json.loads(json.dumps(key)) == key
    assert Judged({1: [1.0], 0: [0.5, None]}, 0.5, [0.0]).key == key  # whoever gave the scores
    others = [({0: [0.5, 0.0], 1: [1.0]}, 0.5), ({0: [0.5], 1: [None, 1.0]}, 0.5), (scores, 0.75), ({1: [1.0]}, 0.5)]
    assert all(Judged(other, drop_at, None).key != key for other, drop_at in others)


def test_every_judge_of_a_run_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_loadable([JudgeArgs(function="exact"), JudgeArgs(function="number")])
    with pytest.raises(SpinError, match="No module named 'absent'"):
        require_loadable([JudgeArgs(function="exact"), JudgeArgs(function="absent:judge")])


# --- comparison --------------------------------------------------------------------------------


def test_comparison_is_paired_by_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means over both samples, without skipped ones: 0.25 before and 0.5 after for every prompt."""
    entry = compared(make_run(tmp_path), held_out(0.0, 0.5), held_out(None, 0.5))
    found = read_check(entry, "judge")
    assert found is not None
    assert (found.prompts, found.before, found.after, found.difference) == (PROMPTS, 0.25, 0.5, 0.25)
    assert found.interval == (0.25, 0.25)
    assert entry["judge"]["worse"] is False
    assert capsys.readouterr().out == (
        "spin: iteration 0, judge's score of held-out responses: +0.2500 → +0.5000 mean score (+0.2500, 95% interval "
        "+0.2500…+0.2500, 10 prompts)\n"
    )


def test_lower_score_stops_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    message = "iteration 0 lowered the judge's score of held-out responses, .* so iteration 1 is not trained"
    with pytest.raises(SpinError, match=message):
        compared(run, held_out(0.5), held_out(0.25))
    with pytest.raises(SpinError, match=message):  # a rerun, before any work
        end_if_stopped(run, SpinArgs())
    run.reset(0)
    state = run.read_state()
    assert state is not None
    assert state.worse() is None


def test_lower_score_is_only_a_warning_with_stop_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopArgs(metric="off")
    assert compared(make_run(tmp_path), held_out(0.5), held_out(0.25), stop=stop)["judge"]["worse"] is True
    assert "warning: iteration 0 lowered the judge's score" in capsys.readouterr().out


def test_noise_is_not_a_lower_score(tmp_path: Path) -> None:
    """Half of the prompts gain as much as the others lose, but for one."""
    before, after = held_out(0.5), held_out(0.0, 0.0, 1.0, 1.0)
    entry = compared(make_run(tmp_path), before, [*after[:-1], 0.0])
    assert entry["judge"]["difference"] < 0
    assert entry["judge"]["worse"] is False


def test_stored_comparison_is_kept_unless_the_pairs_have_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stored = compared(run, held_out(0.5), held_out(0.75))
    assert compared(run, held_out(0.5), held_out(1.0)) == stored
    assert compared(run, held_out(0.5), held_out(1.0), again=True)["judge"]["after"] == 1.0


def test_nothing_is_compared_without_scores_responses_or_enough_prompts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "judge" not in compared(run, None, held_out(0.5))  # of another judge
    few = [*held_out(0.5)[:-6], *[None] * 6]  # 7 prompts are left
    assert "judge" not in compared(run, few, held_out(0.25))
    Shards(run.iteration(0).synthetic).shard(0).unlink()
    assert "judge" not in compared(run, held_out(0.5), held_out(0.25))
