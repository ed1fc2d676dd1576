"""The end of an iteration: its entry in run.json, and the closing messages."""

import time
from collections.abc import Mapping
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.config.specs import LmEvalSpec
from spin_plugin.console import say, warn
from spin_plugin.data.pairs import PairStats
from spin_plugin.export.card import model_card
from spin_plugin.objective.decline import CHECKS, REMEDIES, read_check
from spin_plugin.objective.diagnosis import diagnose, diagnose_result
from spin_plugin.objective.finding import Finding, as_dicts
from spin_plugin.objective.watch import accuracy_limit
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.keep import mark_removed
from spin_plugin.run.state import RunState
from spin_plugin.run.stop import find_best, find_stop
from spin_plugin.training.evaluation import evaluate_finished
from spin_plugin.training.trackers import Trackers

SHOWN = ("loss", "reward_margin", "accuracy")


def finish_iteration(
    run: RunDir, number: int, spin: SpinArgs, stats: Mapping[str, PairStats], outcome: Mapping[str, Any]
) -> list[Finding]:
    """Mark an iteration as finished in run.json, which is written last; then remove what `spin.keep` does not keep.

    Args:
        run: the run directory.
        number: the iteration.
        spin: the `spin:` block of the run.
        stats: statistics of its pairs, by split.
        outcome: what training and its checks add to the entry.

    Returns:
        the findings that are new: those of the pairs and the log were reported when they were made.
    """
    state = run.read_state()
    assert state is not None
    assert len(state.finished) == number
    entry = entry_of(run, number, stats, outcome)
    before = state.finished[-1] if number else None
    said = diagnose(entry["pairs"], run.iteration(number).read_log(), before)
    names = {finding.name for finding in said}
    new = [finding for finding in diagnose_result(entry, before) if finding.name not in names]
    state.finished.append(entry | {"findings": as_dicts([*said, *new])})
    mark_removed(state.finished, spin)
    run.link_newest(number)
    run.write_state(state)
    run.remove_marked()
    return new


def entry_of(run: RunDir, number: int, stats: Mapping[str, PairStats], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Return an iteration's entry of run.json; for the arguments see `finish_iteration`."""
    entry = {
        "iteration": number,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pairs": {split: value.as_dict() for split, value in stats.items() if value.responses},
        "metrics": run.iteration(number).last_metrics(),
    }
    return {**entry, **outcome}


def write_card(run: RunDir, number: int, stats: Mapping[str, PairStats], outcome: Mapping[str, Any]) -> None:
    """Write the model card of an iteration that is trained but not finished; for the arguments see there."""
    state, path = run.read_state(), run.iteration(number).path
    assert state is not None
    state.finished.append(entry_of(run, number, stats, outcome))
    adapter = (path / "adapter_config.json").is_file()
    write_atomically(path / "README.md", model_card(state, number, adapter=adapter))


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


def announce_finished(run: RunDir, number: int, spin: SpinArgs) -> None:
    """Print the results of a finished iteration, whether it made the model worse, and how to go on.

    Args:
        run: the run directory.
        number: the iteration.
        spin: the `spin:` block of the run.
    """
    state = run.read_state()
    assert state is not None
    entry, left = state.finished[number], spin.iterations - number - 1
    stopped = find_stop(state.finished, spin)
    metrics = entry["metrics"]
    shown = [f"{key} {metrics[f'spin/{key}']:.4f}" for key in SHOWN if f"spin/{key}" in metrics]
    if shown and (limit := accuracy_limit(entry["pairs"])) < 1:
        shown[-1] += f" ({1 - limit:.1%} of the pairs are equal)"
    say(
        f"iteration {number} finished, last epoch: {', '.join(shown)}; model in {run.iteration(number).path}; "
        f"{_how_to_go_on(state, spin, left, ends=bool(stopped))}"
    )
    if held_out := read_check(entry, "held_out"):
        check = CHECKS["held_out"]
        say(f"{check.measured}: {held_out.summary(check.unit)}")
    if stopped and not stopped.failed:
        say(stopped.message)
    elif worse := state.worse():
        warn(f"{worse}; {REMEDIES}")


def _how_to_go_on(state: RunState, spin: SpinArgs, left: int, *, ends: bool) -> str:
    """Say what follows an iteration after which `left` remain."""
    if ends:
        return "the run stops here"
    if left:
        return f"{left} to go"
    best = find_best(state.finished, spin.stop)
    return f"that was the last one{f'; {best.described(state.finished)}' if best else ''}"
