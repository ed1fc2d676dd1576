"""The end of an iteration: its entry in run.json, and the closing messages."""

import time
from collections.abc import Mapping
from typing import Any

from spin_plugin.console import say, warn
from spin_plugin.data.pairs import PairStats
from spin_plugin.objective.decline import CHECKS, REMEDIES, read_check
from spin_plugin.objective.diagnosis import diagnose, diagnose_result
from spin_plugin.objective.finding import Finding, as_dicts
from spin_plugin.objective.watch import accuracy_limit
from spin_plugin.run.directory import RunDir

SHOWN = ("loss", "reward_margin", "accuracy")


def finish_iteration(
    run: RunDir, number: int, stats: Mapping[str, PairStats], outcome: Mapping[str, Any]
) -> list[Finding]:
    """Mark an iteration as finished in run.json, which is written last.

    Args:
        run: the run directory.
        number: the iteration.
        stats: statistics of its pairs, by split.
        outcome: what training and its checks add to the entry.

    Returns:
        the findings that are new: those of the pairs and the log were reported when they were made.
    """
    state = run.read_state()
    assert state is not None
    assert len(state.finished) == number
    entry: dict[str, Any] = {
        "iteration": number,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pairs": {split: value.as_dict() for split, value in stats.items() if value.responses},
        "metrics": run.iteration(number).last_metrics(),
    }
    entry |= outcome
    before = state.finished[-1] if number else None
    said = diagnose(entry["pairs"], run.iteration(number).read_log(), before)
    names = {finding.name for finding in said}
    new = [finding for finding in diagnose_result(entry, before) if finding.name not in names]
    state.finished.append(entry | {"findings": as_dicts([*said, *new])})
    run.link_newest(number)
    run.write_state(state)
    return new


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
    metrics = entry["metrics"]
    shown = [f"{key} {metrics[f'spin/{key}']:.4f}" for key in SHOWN if f"spin/{key}" in metrics]
    if shown and (limit := accuracy_limit(entry["pairs"])) < 1:
        shown[-1] += f" (at most {limit:.4f}: identical responses count as misses)"
    say(
        f"iteration {number} finished, last epoch: {', '.join(shown)}; model in {run.iteration(number).path}; "
        f"{f'{left} to go: rerun the same command' if left else 'that was the last one'}"
    )
    if held_out := read_check(entry, "held_out"):
        check = CHECKS["held_out"]
        say(f"{check.measured}: {held_out.summary(check.unit)}")
    if worse := state.worse():
        warn(f"{worse}; {REMEDIES}")
