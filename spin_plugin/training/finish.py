"""The end of an iteration: its entry in run.json, and the closing messages."""

import time
from collections.abc import Mapping
from typing import Any

from spin_plugin.config.specs import LmEvalSpec
from spin_plugin.console import say, warn
from spin_plugin.data.pairs import PairStats
from spin_plugin.objective.decline import CHECKS, REMEDIES, read_check
from spin_plugin.run.directory import RunDir
from spin_plugin.training.evaluation import evaluate_finished
from spin_plugin.training.trackers import Trackers

SHOWN = ("loss", "reward_margin", "accuracy")


def finish_iteration(run: RunDir, number: int, stats: Mapping[str, PairStats], outcome: Mapping[str, Any]) -> None:
    """Mark an iteration as finished in run.json, which is written last.

    Args:
        run: the run directory.
        number: the iteration.
        stats: statistics of its pairs, by split.
        outcome: what training and its checks add to the entry.
    """
    state = run.read_state()
    assert state is not None
    assert len(state.finished) == number
    entry = {
        "iteration": number,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pairs": {split: value.as_dict() for split, value in stats.items() if value.responses},
        "metrics": run.iteration(number).last_metrics(),
    }
    state.finished.append({**entry, **outcome})
    run.link_newest(number)
    run.write_state(state)


def complete_finished(run: RunDir, lm_eval: LmEvalSpec | None, trackers: Trackers) -> None:
    """Evaluate finished iterations that have no scores, and send the trackers what they lack.

    Both follow the entry in run.json, so that a kill meanwhile loses no iteration; the next start makes up for them.

    Args:
        run: the run directory, locked.
        lm_eval: the tasks; None: nothing is evaluated.
        trackers: the trackers of the run.
    """
    evaluate_finished(run, lm_eval)
    trackers.send_results()


def announce_finished(run: RunDir, number: int, iterations: int) -> None:
    """Print the results of a finished iteration, and a warning if it made the model worse.

    Args:
        run: the run directory.
        number: the iteration.
        iterations: `spin.iterations`.
    """
    state = run.read_state()
    assert state is not None
    entry, left = state.finished[number], iterations - number - 1
    metrics, train = entry["metrics"], entry["pairs"]["train"]
    shown = [f"{key} {metrics[f'spin/{key}']:.4f}" for key in SHOWN if f"spin/{key}" in metrics]
    if shown and train["equal"] and not train["equal_dropped"] and "judge" not in train:
        shown[-1] += f" (at most {1 - train['equal'] / train['pairs']:.4f}: identical responses count as misses)"
    say(
        f"iteration {number} finished, last epoch: {', '.join(shown)}; model in {run.iteration(number).path}; "
        f"{f'{left} to go: rerun the same command' if left else 'that was the last one'}"
    )
    if held_out := read_check(entry, "held_out"):
        check = CHECKS["held_out"]
        say(f"{check.measured}: {held_out.summary(check.unit)}")
    if worse := state.worse():
        warn(f"{worse}; {REMEDIES}")
