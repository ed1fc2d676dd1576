"""The disk space that the run takes."""

import shutil
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from spin_plugin.console import say, warn
from spin_plugin.doctor.data import Lengths
from spin_plugin.doctor.memory import ModelSize
from spin_plugin.doctor.settings import Settings
from spin_plugin.run.disk import require_space
from spin_plugin.training.generate import Generation, bytes_needed, model_bytes, writes_model
from spin_plugin.training.loading import stored_dtype
from spin_plugin.training.precision import keeps_masters

HALF = ("bfloat16", "float16")


def check_space(settings: Settings, size: ModelSize, real: Any, found: Lengths | None) -> None:
    """Whether the next iteration and the remaining ones fit on the disk of output_dir.

    Args:
        settings: the configuration.
        size: the model's size.
        real: the data (`data.real.Real`); None if it is out of reach, and then responses are not counted.
        found: its lengths; None as well.

    Raises:
        SpinError: not even the next iteration's model fits.
    """
    spin, training, stored = settings.spin, settings.training, stored_dtype(settings.cfg)
    generation = Generation(
        settings.lowered.run, settings.number, spin, settings.vllm, settings.opponent, settings.data, training,
        keeps_masters(training) and stored in HALF, real,
    )  # fmt: skip
    model = 0
    if settings.opponent.directory:
        model = model_bytes(generation, merges=False)
    elif writes_model(training, spin):  # its files are not looked up on the hub: that may download them
        model = size.parameters * (2 if stored in HALF else 4)
    prompts = (min(found.prompts, spin.num_prompts or found.prompts) + found.held_out) if found else 0
    space = bytes_needed(generation, prompts * spin.generation.num_generations, model)
    place = nearest(settings.lowered.run.root)
    require_space(place, space)
    left = max(1, settings.lowered.spin.iterations - settings.lowered.iteration)
    kept = max(model, 4 * size.adapter)
    needed, free = (left - 1) * kept + space.expected, shutil.disk_usage(place).free
    if needed > free >= space.expected:
        warn(
            f"output_dir: {decimal(free)} left on the disk of {place}, but {left} more iterations take "
            f"about {decimal(needed)}; free some space, or remove models that you do not need"
        )
    say(f"{decimal(needed)} at most for {left} iterations, {decimal(free)} free")


def nearest(directory: Path) -> Path:
    """Return the directory or its nearest existing parent."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory
