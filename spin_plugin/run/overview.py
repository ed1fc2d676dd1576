"""The iterations of a run, finished or not, as its files show them; read without the lock, also while it trains."""

import json
from typing import Any

from spin_plugin.objective.decline import decline
from spin_plugin.objective.diagnosis import diagnose
from spin_plugin.objective.finding import as_dicts
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import has_model


def list_iterations(run: RunDir, total: int) -> list[dict[str, Any]]:
    """Return state, pair statistics and latest metrics of every iteration.

    Args:
        run: the run directory.
        total: `spin.iterations`.

    Raises:
        SpinError: the run directory is damaged.
    """
    state = run.read_state()
    finished = state.finished if state else []
    iterations = [entry | {"state": _finished_state(entry)} for entry in finished]
    before = finished[-1] if finished else None
    for number in range(len(finished), total):
        iterations.append(_unfinished(run, number, before, started=number == len(finished)))
    return iterations


def _finished_state(entry: dict[str, Any]) -> str:
    """Say whether a finished iteration made the model worse, and whether its model is there."""
    remarks = {"worse": decline(entry), "model removed": not has_model(entry)}
    return ", ".join(["finished", *(remark for remark, holds in remarks.items() if holds)])


def _unfinished(run: RunDir, number: int, before: dict[str, Any] | None, *, started: bool) -> dict[str, Any]:
    """Return the progress of an unfinished iteration; `before` is the entry of the last finished one."""
    directory = run.iteration(number)
    stats_file = directory.pairs / "stats.json"
    pairs = json.loads(stats_file.read_text(encoding="utf-8")) if started and stats_file.exists() else {}
    metrics = directory.last_metrics() if started else {}
    if metrics:
        state = f"training, step {int(metrics['step'])}"
    elif pairs:
        state = "pairs built"
    elif started and directory.synthetic.exists():
        shards = len(list(directory.synthetic.glob("shard-*.jsonl")))
        state = f"generating responses, {shards} shards"
    else:
        state = "not started"
    found = as_dicts(diagnose(pairs, directory.read_log(), before)) if pairs else []
    return {"iteration": number, "state": state, "pairs": pairs, "metrics": metrics, "findings": found}
