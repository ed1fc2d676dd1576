"""Write `report.html`, `report.json` (all but the grid) and `report.jsonl` (the grid, a prompt per line)."""

import json
import math
import time
from pathlib import Path
from typing import Any

import yaml

from spin_plugin import __version__
from spin_plugin.args import SpinArgs
from spin_plugin.console import SpinError, warn
from spin_plugin.report.curves import read_curves
from spin_plugin.report.decoder import decoder
from spin_plugin.report.grid import Grid
from spin_plugin.report.page import render
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.overview import list_iterations
from spin_plugin.run.stop import conclusion

PROMPTS = 300
"""Prompts in the grid, by default."""


def write_report(run: RunDir, spin: SpinArgs, prompts: int = PROMPTS) -> Path:
    """Write the report of a run and return the page's path.

    Reads the run directory without its lock, so it may be called while another process trains.

    Args:
        run: the run directory.
        spin: the `spin:` block of the run.
        prompts: how many prompts the grid shows at most.

    Raises:
        SpinError: there is no run yet, or its directory is damaged.
        OSError: the report cannot be written.
    """
    state = run.read_state()
    if state is None:
        raise SpinError(f"output_dir: {run.root} holds no run yet; start it with `axolotl spin train CONFIG`")
    grid, curves = Grid(run), read_curves(run)
    rows = [row.as_dict() for row in grid.rows(prompts, decoder(run, state.config))]
    content: dict[str, Any] = {
        "name": run.root.resolve().name,
        "output_dir": str(run.root),
        "written_at": time.strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
        "total": spin.iterations,
        "iterations": [
            _finite(entry | {"config": _shown(_read_config(run.iteration(entry["iteration"])))})
            for entry in list_iterations(run, spin.iterations)
        ],
        "curves": [{"iteration": curve.iteration, "points": curve.points} for curve in curves],
        **conclusion(state.finished, spin),
        "prompts": {"shown": len(rows), "all": grid.prompts},
        "notes": grid.notes,
        "config": _shown(state.config),
    }
    page = run.report
    write_atomically(page.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(page.with_suffix(".json"), json.dumps(content, indent=1, default=str) + "\n")
    # a lone surrogate in the configuration has no UTF-8
    write_atomically(page, render(content, curves, rows).encode(errors="xmlcharrefreplace"))
    return page


def try_report(run: RunDir, spin: SpinArgs) -> None:
    """Write the report of a run that must not fail with it: an error becomes one warning."""
    try:
        write_report(run, spin)
    except Exception as error:  # noqa: BLE001 - whatever it is, what was trained must not be lost for it
        reason = str(error) or type(error).__name__
        warn(f"the report was not written ({reason}); `axolotl spin report CONFIG` writes it")


def _finite(value: Any) -> Any:
    """Return plain data with None for numbers that are not finite, which JSON does not have: training may diverge."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(config: Any) -> Any:
    """Return a configuration without what a judge is given: names of files, addresses, secrets under any name."""
    if isinstance(config, list):
        return [_shown(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: {option: item for option, item in value.items() if option != "kwargs"}
        if key == "judge" and isinstance(value, dict)
        else _shown(value)
        for key, value in config.items()
    }


def _read_config(directory: IterationDir) -> dict[str, Any]:
    """Return the configuration resolved for an iteration; empty before it is."""
    if not directory.config.exists():
        return {}
    try:
        content = yaml.safe_load(directory.config.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        warn(f"report: {directory.config} is damaged, so the report does not show it")
        return {}
    return content if isinstance(content, dict) else {}
