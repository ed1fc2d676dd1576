"""The end of an iteration: its entry in run.json, and the closing messages."""

import time
from collections.abc import Mapping
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.console import say, warn
from spin_plugin.data.pairs import PairStats
from spin_plugin.export.card import model_card
from spin_plugin.objective.decline import CHECKS, REMEDIES, read_check
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.keep import mark_removed
from spin_plugin.run.state import RunState
from spin_plugin.run.stop import EXPORT, find_best, find_stop

SHOWN = ("loss", "reward_margin", "accuracy")


def finish_iteration(
    run: RunDir, number: int, spin: SpinArgs, stats: Mapping[str, PairStats], outcome: Mapping[str, Any]
) -> None:
    """Mark an iteration as finished in run.json, which is written last; then remove what `spin.keep` does not keep.

    Args:
        run: the run directory.
        number: the iteration.
        spin: the `spin:` block of the run.
        stats: statistics of its pairs, by split.
        outcome: what training and its checks add to the entry.
    """
    state = run.read_state()
    assert state is not None
    assert len(state.finished) == number
    state.finished.append(entry_of(run, number, stats, outcome))
    mark_removed(state.finished, spin)
    run.link_newest(number)
    run.write_state(state)
    run.remove_marked()


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
    metrics, train = entry["metrics"], entry["pairs"]["train"]
    shown = [f"{key} {metrics[f'spin/{key}']:.4f}" for key in SHOWN if f"spin/{key}" in metrics]
    if shown and train["equal"] and not train["equal_dropped"] and "judge" not in train:
        shown[-1] += f" (at most {1 - train['equal'] / train['pairs']:.4f}: identical responses count as misses)"
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
        return f"{left} to go: rerun the same command"
    best = find_best(state.finished, spin.stop)
    return f"that was the last one{f'; best: {best}, which `{EXPORT}` writes' if best else ''}"
