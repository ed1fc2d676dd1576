"""Evaluate the tiny task's SFT model and finished SPIN iterations: prints a table with a curve, writes `summary.json`
and the plot `accuracy.svg`.

    python scripts/tiny/evaluate.py --run outputs/spin-tiny --sft outputs/tiny/sft \\
        --data outputs/tiny/data/heldout.jsonl

Results for unchanged weights are reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import evaluate_model, read_heldout
from plot import plot
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from task import Item

__all__ = ["evaluate_model", "find_iterations", "summarize"]

WEIGHTS = "model.safetensors"
SUMMARY, PICTURE = "summary.json", "accuracy.svg"
BAR_WIDTH = 18
Entry = dict[str, Any]


def summarize(run: Path, sft: Path, data: Path) -> dict[str, Any]:
    """Evaluate the models missing from `run/summary.json`, rewrite it and return it.

    Raises:
        ValueError: the SFT model, the held-out data or the run is missing.
    """
    for path in (sft / WEIGHTS, data, run):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    heldout_sha256 = _sha256(data)
    earlier = _earlier_entries(run / SUMMARY, heldout_sha256)
    heldout, iterations, console = read_heldout(data), find_iterations(run), Console()
    models = [sft, *(path for _, path in iterations)]
    # stderr, on which transformers shows bars of its own, stays apart
    hidden = not console.is_terminal
    with Progress(console=console, transient=True, redirect_stderr=False, disable=hidden) as bar:
        start, *entries = [_entry(model, heldout, earlier) for model in bar.track(models, description="evaluating")]
    summary = {
        "heldout_sha256": heldout_sha256,
        "sft": start,
        "iterations": [{"iteration": number, **entry} for (number, _), entry in zip(iterations, entries, strict=True)],
    }
    _write_atomically(run / SUMMARY, json.dumps(summary, indent=2) + "\n")
    _write_atomically(run / PICTURE, plot([(name, _accuracies(entry)) for name, entry in _named_entries(summary)]))
    return summary


def find_iterations(run: Path) -> list[tuple[int, Path]]:
    """Return the finished `iteration-N` directories of a run, sorted by number."""
    matches = ((re.fullmatch(r"iteration-(\d+)", path.name), path) for path in run.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match and (path / WEIGHTS).exists())


def _earlier_entries(summary: Path, heldout_sha256: str) -> dict[str, Entry]:
    """Return earlier results by weight hash; empty if the held-out data has changed."""
    if not summary.exists():
        return {}
    earlier = json.loads(summary.read_text())
    if earlier["heldout_sha256"] != heldout_sha256:
        return {}
    return {entry["sha256"]: entry for entry in (earlier["sft"], *earlier["iterations"])}


def _entry(path: Path, heldout: Sequence[Item], earlier: dict[str, Entry]) -> Entry:
    sha256 = _sha256(path / WEIGHTS)
    entry = earlier.get(sha256)
    if entry is None:
        return {**evaluate_model(path, heldout), "sha256": sha256}
    return {key: value for key, value in entry.items() if key != "iteration"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _table(summary: dict[str, Any]) -> Table:
    table = Table("exact match", box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("in-domain", "out-of-domain", "mean", "KL"):
        table.add_column(column, justify="right")
    table.add_column("mean, 0–100%", no_wrap=True)
    for name, entry in _named_entries(summary):
        accuracies = _accuracies(entry)
        mean = sum(accuracies) / len(accuracies)
        numbers = [f"{value:.1f}" for value in (*accuracies, mean)]
        table.add_row(name, *numbers, f"{entry['kl']:.3f}", Bar(100, 0, mean, width=BAR_WIDTH))
    return table


def _accuracies(entry: Entry) -> list[float]:
    return [entry["in_domain"], entry["out_of_domain"]]


def _named_entries(summary: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    yield "SFT start", summary["sft"]
    for entry in summary["iterations"]:
        yield f"iteration {entry['iteration']}", entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        summary = summarize(arguments.run, arguments.sft, arguments.data)
    except ValueError as error:
        parser.error(str(error))
    console = Console(soft_wrap=True)
    console.print(_table(summary))
    console.print(f"plot: {arguments.run / PICTURE}")


if __name__ == "__main__":
    main()
