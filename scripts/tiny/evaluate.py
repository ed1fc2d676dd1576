"""Measures the tiny task's SFT start and finished SPIN iterations: a table and `summary.json`.

    python scripts/tiny/evaluate.py --run outputs/spin-tiny --sft outputs/tiny/sft \\
        --data outputs/tiny/data/heldout.jsonl

A model whose weights were measured before is not measured again.
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
from rich.console import Console
from rich.table import Table
from task import Item

__all__ = ["evaluate_model", "find_iterations", "summarise"]

WEIGHTS = "model.safetensors"
SUMMARY = "summary.json"
Entry = dict[str, Any]


def summarise(run: Path, sft: Path, data: Path) -> dict[str, Any]:
    """Measures what `run/summary.json` does not hold yet, writes it anew and returns it.

    Raises ValueError if the SFT model, the held-out data or the run is missing.
    """
    for path in (sft / WEIGHTS, data, run):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    heldout_sha256 = _sha256(data)
    known = _known_entries(run / SUMMARY, heldout_sha256)
    heldout = read_heldout(data)
    summary = {
        "heldout_sha256": heldout_sha256,
        "sft": _entry(sft, heldout, known),
        "iterations": [{"iteration": number, **_entry(path, heldout, known)} for number, path in find_iterations(run)],
    }
    _write_atomically(run / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def find_iterations(run: Path) -> list[tuple[int, Path]]:
    """The finished `iteration-N` directories of a run, in the order of their numbers."""
    matches = ((re.fullmatch(r"iteration-(\d+)", path.name), path) for path in run.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match and (path / WEIGHTS).exists())


def _known_entries(summary: Path, heldout_sha256: str) -> dict[str, Entry]:
    """Earlier results by the hash of their weights; none if the held-out prompts were others."""
    if not summary.exists():
        return {}
    earlier = json.loads(summary.read_text())
    if earlier["heldout_sha256"] != heldout_sha256:
        return {}
    return {entry["sha256"]: entry for entry in (earlier["sft"], *earlier["iterations"])}


def _entry(path: Path, heldout: Sequence[Item], known: dict[str, Entry]) -> Entry:
    sha256 = _sha256(path / WEIGHTS)
    earlier = known.get(sha256)
    if earlier is None:
        return {**evaluate_model(path, heldout), "sha256": sha256}
    return {key: value for key, value in earlier.items() if key != "iteration"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _table(summary: dict[str, Any]) -> Table:
    table = Table("model", title="Exact match of answers sampled at temperature 1")
    for column in ("in-domain %", "out-of-domain %", "mean %", "KL (nats)"):
        table.add_column(column, justify="right")
    for name, entry in _named_entries(summary):
        inside, outside = entry["in_domain"], entry["out_of_domain"]
        accuracies = (f"{value:.1f}" for value in (inside, outside, (inside + outside) / 2))
        table.add_row(name, *accuracies, f"{entry['kl']:.3f}")
    return table


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
        summary = summarise(arguments.run, arguments.sft, arguments.data)
    except ValueError as error:
        parser.error(str(error))
    Console().print(_table(summary))


if __name__ == "__main__":
    main()
