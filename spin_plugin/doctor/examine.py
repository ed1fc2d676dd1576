"""All checks in order; each runs if those that it needs have passed."""

from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

from spin_plugin.console import say
from spin_plugin.doctor.checkup import Checkup, Result
from spin_plugin.doctor.data import Lengths, check_lengths, one_pair, real_data
from spin_plugin.doctor.disk import check_space
from spin_plugin.doctor.machine import VllmProbe, check_devices, check_packages, devices
from spin_plugin.doctor.memory import ModelSize
from spin_plugin.doctor.model import (
    check_generation_memory,
    check_opponent,
    check_tokenizer,
    check_training_memory,
    measure,
)
from spin_plugin.doctor.schedule import plan
from spin_plugin.doctor.settings import Settings, check_engines, check_output_dir, check_own_keys, read_settings
from spin_plugin.doctor.speed import hours
from spin_plugin.training.judged import require_loadable

Numbers = dict[str, Any]


def examine(raw: dict[str, Any], processes: int | None, report: Callable[[Result], None]) -> Numbers:
    """Examine a configuration and this machine.

    Args:
        raw: the content of the YAML file.
        processes: training processes; None: one for each visible GPU.
        report: called with each result as soon as it is known.

    Returns:
        What was counted, as far as it could be: `parameters`, `trained`, `processes`, `training_bytes`, `prompts`,
        `iteration` (the next one), `schedule` (one mapping per iteration), `hours` (of all that is left), and `pair`,
        an example in full.
    """
    checkup, numbers = Checkup(report), Numbers()
    with ExitStack() as stack:
        probe = checkup.run("vLLM", VllmProbe, _vllm_python(raw))  # imports vLLM meanwhile
        if probe:
            stack.callback(probe.close)
        checkup.run("packages", check_packages)
        checkup.run("devices", check_devices)
        numbers["processes"] = processes = processes or sum(device.gpu for device in devices()) or 1
        settings = checkup.run("configuration", read_settings, raw, processes)
        if settings:
            # Axolotl writes a tokenizer with other added tokens, and we the examples, into output_dir
            settings.cfg.output_dir = stack.enter_context(TemporaryDirectory(prefix="spin-doctor-"))
            _examine_run(checkup, settings, numbers)
        if probe:
            checkup.run("vLLM", probe.check)
    return numbers


def _vllm_python(raw: dict[str, Any]) -> str | None:
    """Return `generation.vllm_python`, whatever else is wrong with the configuration."""
    spin = raw.get("spin")
    generation = spin.get("generation") if isinstance(spin, dict) else None
    configured = generation.get("vllm_python") if isinstance(generation, dict) else None
    return configured if isinstance(configured, str) else None


def _examine_run(checkup: Checkup, settings: Settings, numbers: Numbers) -> None:
    """Everything that needs a valid configuration."""
    checkup.run("configuration", check_own_keys, settings)
    checkup.run("output_dir", check_output_dir, settings)
    checkup.run("engines", check_engines, settings)
    checkup.run("judge", _load_judges, settings)
    checkup.run("weights", check_opponent, settings)
    size = checkup.run("model", measure, settings)
    if size:
        numbers |= {"parameters": size.parameters, "trained": size.adapter or size.parameters}
        numbers["training_bytes"] = checkup.run("memory", check_training_memory, settings, size)
        checkup.run("memory", check_generation_memory, settings, size)
    tokenizer = checkup.run("tokenizer", check_tokenizer, settings)
    if not tokenizer:
        return checkup.skip("data", "needs the tokenizer, as lengths and schedule do")
    data = checkup.run("data", real_data, settings)
    real, scale = data or (None, 1.0)
    found = checkup.run("lengths", check_lengths, settings, real, scale) if real else None
    if size:
        checkup.run("disk", check_space, settings, size, real, found)
    if real and found:
        _examine_data(checkup, settings, numbers, found, size)
        numbers["pair"] = checkup.run("pair", one_pair, settings, real, tokenizer)


def _examine_data(
    checkup: Checkup, settings: Settings, numbers: Numbers, found: Lengths, size: ModelSize | None
) -> None:
    numbers |= {"prompts": found.prompts, "iteration": settings.lowered.iteration}
    planned = checkup.run("schedule", plan, settings, found, _synthetic_length(settings, found))
    if planned:
        numbers["schedule"] = [one.as_dict() for one in planned]
    if planned and size:
        numbers["hours"] = checkup.run("hours", hours, settings, size, planned)


def _load_judges(settings: Settings) -> None:
    """Load every judge of the run, as training does before anything is generated."""
    judges = settings.lowered.spin.judges
    if judges:
        require_loadable(judges)
        say(f"loaded: {', '.join(judge.function for judge in judges)}")


def _synthetic_length(settings: Settings, found: Lengths) -> float:
    """Return the mean length of synthetic responses: that of the last finished iteration, or else of the real ones."""
    state = settings.lowered.run.read_state()
    if state and state.finished and (stats := state.finished[-1]["pairs"].get("train")):
        return float(stats["synthetic_mean"])
    return float(found.real.mean())
