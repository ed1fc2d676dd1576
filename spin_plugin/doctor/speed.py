"""Hours, where a measured speed exists: of this run's finished iterations, or of a benchmark on such a device."""

import json
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from spin_plugin.console import say
from spin_plugin.doctor.checkup import Skipped
from spin_plugin.doctor.machine import devices
from spin_plugin.doctor.memory import ModelSize
from spin_plugin.doctor.schedule import Planned, iterations
from spin_plugin.doctor.settings import Settings
from spin_plugin.generation.python import CHECKOUT

RESULTS = CHECKOUT / "scripts/bench/results"
SIMILAR = 1.25  # how far the number of parameters may be from the measured model's


class Speed(NamedTuple):
    """A measured speed, in tokens per second of all processes; None if it was not measured."""

    generate: float | None
    train: float | None
    source: str


def hours(settings: Settings, size: ModelSize, planned: list[Planned]) -> float | None:
    """Say how many hours the unfinished iterations take, as far as a speed was measured.

    Returns:
        Their sum; None if the speed of generating or that of training was not measured.

    Raises:
        Skipped: none was.
    """
    left = [one for one in planned if one.iteration >= settings.lowered.iteration]
    if not left:
        raise Skipped("all iterations are finished")
    speed = _of_this_run(settings) or _of_a_benchmark(settings, size)
    if speed is None:
        raise Skipped("no measured speed for this model, device and precision; a finished iteration shows it")
    generate = sum(one.generated for one in left) / speed.generate / 3600 if speed.generate else None
    train = sum(one.trained for one in left) / speed.train / 3600 if speed.train else None
    parts = [
        f"{name} {value:.2g} h" if value is not None else f"{name} not measured"
        for name, value in (("generating", generate), ("training", train))
    ]
    say(f"hours of {iterations(len(left))}: {', '.join(parts)} ({speed.source}); loading comes on top")
    return None if generate is None or train is None else generate + train


def _of_this_run(settings: Settings) -> Speed | None:
    """The speed of the last finished iteration, whose stages are recorded."""
    state = settings.lowered.run.read_state()
    stages = (state.finished[-1].get("stages") if state and state.finished else None) or {}
    rates = {
        name: stage["tokens"] / stage["seconds"]
        for name, stage in stages.items()
        if stage.get("tokens") and stage.get("seconds")
    }
    if not rates:
        return None
    return Speed(rates.get("generate"), rates.get("train"), "at the speed of this run's last iteration")


def _of_a_benchmark(settings: Settings, size: ModelSize) -> Speed | None:
    """The speed of a training step that `scripts/bench/step.py` measured, if device, dtype and size match."""
    training, device = settings.training, devices()[0]
    if training.adapter or not device.gpu or training.world_size > 1:
        return None
    wanted = {"dtype": training.dtype, "checkpointing": bool(settings.cfg.gradient_checkpointing)}
    for file in sorted(RESULTS.glob("step-*.json")):
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        matching = [run for run in runs if _matches(run, device.name, wanted, size.parameters)]
        if rate := fastest(matching):
            return Speed(None, rate, f"{file.name}, a model of similar size on this GPU")
    return None


def _matches(run: Mapping[str, Any], device: str, wanted: Mapping[str, Any], parameters: int) -> bool:
    options = run["options"]
    same = run["machine"].startswith(device) and options["preset"] == "1b"
    same = same and all(options.get(key) == value for key, value in wanted.items())
    ratio = parameters / llama_parameters(options["layers"], options["hidden"], options["vocab"])
    return same and 1 / SIMILAR < ratio < SIMILAR


def llama_parameters(layers: int, hidden: int, vocabulary: int) -> int:
    """Return the matrices' parameters of the step benchmark's model `1b`: heads of 64, four for each key head,
    an intermediate size of 4 × hidden, and a tied embedding."""
    attention = 2 * hidden * hidden + 2 * hidden * hidden // 4
    return layers * (attention + 3 * hidden * 4 * hidden) + vocabulary * hidden


def fastest(runs: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the highest of the runs' median speeds, in unique tokens per second of our side; None without runs."""
    speeds = [
        median(tokens / seconds for tokens, seconds in zip(run["unique_tokens"], run["seconds"]["ours"], strict=True))
        for run in runs
        if "ours" in run["seconds"]
    ]
    return max(speeds, default=None)
