"""When a run stops, and which iteration is best: the rules of `spin.stop` on the finished iterations in run.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spin_plugin.args import SpinArgs, StopArgs
from spin_plugin.args.stop import AUTO, OFF
from spin_plugin.console import SpinError, say
from spin_plugin.objective.best import START, Measured, measured
from spin_plugin.objective.decline import CHECKS, REMEDIES, decline
from spin_plugin.run.directory import RunDir
from spin_plugin.run.processes import rank
from spin_plugin.run.state import has_model, restartable

EXPORT = "axolotl spin export CONFIG DIR"
Entries = Sequence[Mapping[str, Any]]
"""The finished iterations in run.json, in order."""


@dataclass(frozen=True)
class Best:
    """The best finished iteration."""

    iteration: int
    metric: str
    value: float
    worse_than_start: bool
    """Whether even this one is worse than the model that the run started from, beyond noise."""

    def __str__(self) -> str:
        value = f"{self.value:.4f}".replace("-", "−")
        remark = ", worse than the start" if self.worse_than_start else ""
        return f"iteration {self.iteration} ({self.metric} {value}{remark})"

    def described(self, finished: Entries) -> str:
        """Return it with how to get its model."""
        kept = has_model(finished[self.iteration])
        return f"best: {self}, " + (f"which `{EXPORT}` writes" if kept else "whose model `spin.keep` has removed")


@dataclass(frozen=True)
class Stop:
    """Why a run has stopped."""

    message: str
    """One line: the reason, the best iteration, and how to go on."""
    failed: bool
    """Whether that is an error: even the best iteration is worse than the model that the run started from, or none was
    measured."""


def find_best(finished: Entries, stop: StopArgs) -> Best | None:
    """Return the best finished iteration by the metric of `spin.stop`; None if it was not measured.

    With `auto` and `off` it is the one whose held-out real responses are likeliest, among those that made nothing
    worse. The judge, where both are measured, decides only by name: it scores an iteration only once the next one is
    prepared, and so never the last.
    """
    found, left_out = _measured(finished, stop)
    number = found.best(left_out)
    if number is None:
        return None
    worse = found.worse_than_start(number) or number in left_out
    return Best(number, found.metric, found.values[number], worse)


def find_stop(finished: Entries, spin: SpinArgs) -> Stop | None:
    """Say why the run has stopped before its last iteration; None if it has not."""
    stop, last = spin.stop, len(finished) - 1
    reason, best = _reason(finished, stop), find_best(finished, stop)
    if reason is None or best is None or len(finished) >= spin.iterations:
        return None
    failed = best.worse_than_start
    result = "no iteration is better than the model that the run started from" if failed else best.described(finished)
    loosen = "`spin.stop: off`" if stop.metric == AUTO else "a larger `spin.stop.patience`"
    again = restartable(finished, len(finished))[-1]
    return Stop(
        f"{reason}, so iteration {last + 1} is not trained; {result}; to go on all the same, set {loosen}; to train "
        f"iteration {again} again, run `axolotl spin reset CONFIG --iteration {again}`, then {REMEDIES} in "
        "spin.schedule",
        failed,
    )


def conclusion(finished: Entries, spin: SpinArgs) -> dict[str, Any]:
    """Return as plain data which iteration is `best`, and why the run has `stopped`; None where that is not known."""
    best, stopped = find_best(finished, spin.stop), find_stop(finished, spin)
    return {"best": asdict(best) if best else None, "stopped": stopped.message if stopped else None}


def end_if_stopped(run: RunDir, spin: SpinArgs) -> None:
    """End this process if the run has stopped. Every rank may call it; rank 0 says why.

    Raises:
        SpinError: the run has stopped without a model better than its first, or its metric was not measured.
        SystemExit: the run has stopped; with code 0, also in every rank but the first, whose exit code counts: at
            another one, a launcher would terminate the first rank at once.
    """
    if stopped := read_stop(run, spin):
        if rank() == 0 and stopped.failed:
            raise SpinError(stopped.message)
        if rank() == 0:
            say(stopped.message)
        raise SystemExit(0)


def read_stop(run: RunDir, spin: SpinArgs) -> Stop | None:
    """Say why the run cannot go on; None if it can."""
    state = run.read_state()
    return (_unmeasured(state.finished, spin.stop) or find_stop(state.finished, spin)) if state else None


def _unmeasured(finished: Entries, stop: StopArgs) -> Stop | None:
    """Refuse to go on if the metric of `spin.stop` cannot stop the run, because no iteration has it."""
    if stop.metric in (AUTO, OFF) or not finished:
        return None
    # the last one is judged by the next, and an evaluation that was interrupted is repeated
    key = stop.metric if stop.metric in CHECKS else "lm_eval"
    settled = finished[:-1] if key != "held_out" and key not in finished[-1] else finished
    if not settled or measured(settled, stop.metric).values:
        return None
    known = {*(settled[-1].keys() & CHECKS.keys()), *(settled[-1].get("lm_eval") or {})}
    known = {name for name in known if "_stderr" not in name}
    return Stop(
        f"spin.stop.metric: {stop.metric} was not measured in iteration {len(settled) - 1}; use "
        f"{' or '.join(sorted(known)) or 'another metric'}, or `spin.stop: off`",
        failed=True,
    )


def _measured(finished: Entries, stop: StopArgs) -> tuple[Measured, list[int]]:
    """Return the metric that decides, and the iterations that cannot be best because they made something worse."""
    if stop.metric not in (AUTO, OFF):
        return measured(finished, stop.metric), []
    found = (measured(finished, name) for name in CHECKS)
    left_out = [number for number, entry in enumerate(finished) if decline(entry)]
    return next((each for each in found if each.values), measured(finished, "held_out")), left_out


def _reason(finished: Entries, stop: StopArgs) -> str | None:
    """Return why the run stops after its last finished iteration; None if it goes on."""
    if not finished or stop.metric == OFF:
        return None
    last = len(finished) - 1
    if stop.metric == AUTO:
        worse = decline(finished[-1])
        return f"iteration {last} {worse}" if worse else None
    found = measured(finished, stop.metric)
    if not found.values:
        return None
    reference, followed = found.last_improvement()
    if followed < stop.patience:
        return None
    since = "the start" if reference == START else f"iteration {reference}"
    return f"{stop.metric} has not improved since {since} (spin.stop.patience: {stop.patience})"
