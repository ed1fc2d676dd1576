"""`axolotl spin doctor`: what can be known about a run before GPU hours are spent."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import click
from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from spin_plugin.cli.config_file import CONFIG, read_yaml
from spin_plugin.config.lower import asks_for_spin
from spin_plugin.console import SpinError, console, escaped, exit_on_error

MARKS = {"ok": ("✓", "green"), "warning": ("!", "bold yellow"), "fault": ("✗", "bold red"), "skipped": ("–", "dim")}
QUIET = {
    "AXOLOTL_LOG_LEVEL": "ERROR",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",  # a dataset that is not in the cache may be large
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_ETAG_TIMEOUT": "5",  # seconds, where a firewall swallows the request
}


@click.command()
@CONFIG
@click.option("--num-processes", type=click.IntRange(min=1), help="Training processes. Default: one per visible GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as the last line of the output.")
@exit_on_error
def doctor(config: Path, num_processes: int | None, as_json: bool) -> None:
    """Check CONFIG, its model, its data and this machine before anything is run; changes nothing.

    Shows the memory and disk that the run needs, one pair in full, and every iteration's steps and tokens. The exit
    code is 1 if something is wrong (✗). What cannot be reached, as a hub without network, is skipped (–).
    """
    raw = read_yaml(config)
    if not asks_for_spin(raw):
        raise SpinError(f"{config}: not a SPIN configuration; it needs `rl: spin` and a `spin:` block")
    results: list[dict[str, str]] = []
    numbers: dict[str, Any] = {}
    for message in _examined(raw, num_processes):
        if result := message.get("result"):
            results.append(result)
            if not as_json:
                _show(result)
        numbers = message.get("numbers", numbers)
    if not results:
        raise SpinError("the examination reported no check; reinstall spin-plugin, whose parts do not fit together")
    if as_json:
        click.echo(json.dumps({"config": str(config), "checks": results, **numbers}))
    else:
        _show_numbers(numbers)
        _conclude(results, numbers)
    if any(result["verdict"] == "fault" for result in results):
        raise SystemExit(1)


def _examined(raw: dict[str, Any], processes: int | None) -> Iterator[dict[str, Any]]:
    """Yield the messages of `spin_plugin.doctor`, which runs in a process of its own."""
    command = [sys.executable, "-m", "spin_plugin.doctor", str(processes or 0)]
    package = str(Path(__file__).parents[2])  # also without an installation
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with TemporaryFile() as log:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            env=os.environ | QUIET | {"PYTHONPATH": paths},
        ) as child:  # fmt: skip
            assert child.stdin and child.stdout
            # it may end before it reads; its exit code and its log tell why
            with suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(raw, default=str))  # not an argument, which others could read
            try:
                yield from map(json.loads, child.stdout)
            finally:
                if child.poll() is None and sys.exc_info()[0]:
                    child.terminate()
        if child.returncode:
            message = f"the examination ended with exit code {child.returncode}: {_last_line(log)}"
            yield {"result": {"check": "doctor", "verdict": "fault", "message": message}}


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _show(result: dict[str, str]) -> None:
    mark, style = MARKS[result["verdict"]]
    words = Text.assemble((f"{mark} ", style), (f"{result['check']:<14}", "bold"), result["message"])
    console.print(words)


def _show_numbers(numbers: dict[str, Any]) -> None:
    if pair := numbers.get("pair"):
        _show_pair(pair)
    if schedule := numbers.get("schedule"):
        console.print(_table(schedule))


def _show_pair(pair: dict[str, Any]) -> None:
    """Show a pair in full; what is trained on is green."""
    console.print("\none pair in full, with special tokens:")
    for side, content in pair.items():
        trained = "trained" if content["trained"] else "not trained"
        console.print(Text(f"  {side}, {content['tokens']} tokens, {trained}", "bold"))
        for line in content["text"].split("\n"):
            console.print(Text.assemble("    ", (escaped(line), "green" if content["trained"] else "")))
    if "synthetic" not in pair:
        console.print("  synthetic, trained: vLLM will generate it")


def _table(schedule: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("t", "pairs ≤", "steps", "warm-up", "learning rate", "beta", "loss", "generates", "trains"):
        table.add_column(heading, justify="left" if heading == "loss" else "right", overflow="fold")
    for one in schedule:
        pairs, steps, warmup, generated, trained = (
            f"{one[name]:,}" for name in ("pairs", "steps", "warmup_steps", "generated", "trained")
        )
        settings = f"{one['learning_rate']:g}", f"{one['beta']:g}", one["loss"]
        table.add_row(str(one["iteration"]), pairs, steps, warmup, *settings, generated, trained)
    return table


def _conclude(results: list[dict[str, str]], numbers: dict[str, Any]) -> None:
    counts = {verdict: sum(result["verdict"] == verdict for result in results) for verdict in MARKS}
    parts = [f"{counts['fault']} wrong", f"{counts['warning']} to look at", f"{counts['skipped']} skipped"]
    if numbers.get("parameters"):
        parts.append(f"{numbers['parameters'] / 1e6:,.2f}M parameters")
    if numbers.get("training_bytes"):
        parts.append(f"{decimal(numbers['training_bytes'])} to train, without activations")
    if left := [one for one in numbers.get("schedule", ()) if one["iteration"] >= numbers["iteration"]]:
        parts += [
            f"{sum(one['generated'] for one in left):,} tokens to generate",
            f"{sum(one['trained'] for one in left):,} to train",
        ]
    if numbers.get("hours"):
        parts.append(f"{numbers['hours']:.2g} h")
    style = MARKS["fault" if counts["fault"] else "warning" if counts["warning"] else "ok"]
    console.print(Text.assemble((f"{style[0]} ", style[1]), ", ".join(parts)))
