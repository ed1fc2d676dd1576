"""The iterations of a run, finished or not, as its files show them; read without the lock, also while it trains."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError
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
    for entry, part in product(finished, ("pairs", "metrics")):
        if not isinstance(entry.get(part), dict):
            raise SpinError(f"{run.state_file} is damaged (no {part} in an iteration); restore it from a backup")
    iterations = [entry | {"state": _finished_state(entry)} for entry in finished]
    before = finished[-1] if finished else None
    for number in range(len(finished), total):
        iterations.append(_unfinished(run, number, before, started=number == len(finished)))
    return iterations


def _finished_state(entry: dict[str, Any]) -> str:
    """Say whether a finished iteration made the model worse, and whether its model is there."""
    remarks = {"worse": decline(entry), "model removed": not has_model(entry)}
    return ", ".join(["finished", *(remark for remark, holds in remarks.items() if holds)])


def newest_stats(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the statistics of an iteration's own responses to training prompts; empty without pairs.

    Runs of an early 0.2 have them only together with those of earlier iterations, which are trained on, too.
    """
    trained: Mapping[str, Any] = (entry.get("pairs") or {}).get("train") or {}
    newest = trained.get("newest") or {}
    return {**trained, **newest} if newest.get("responses") else trained


def _read_stats(file: Path) -> dict[str, Any]:
    """Return the statistics of an iteration's pairs; empty before they are built."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise SpinError(f"{file} is damaged; remove {file.parent}, which the next start builds again")
    return content


def _unfinished(run: RunDir, number: int, before: dict[str, Any] | None, *, started: bool) -> dict[str, Any]:
    """Return the progress of an unfinished iteration; `before` is the entry of the last finished one."""
    directory = run.iteration(number)
    pairs = _read_stats(directory.pairs / "stats.json") if started else {}
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
