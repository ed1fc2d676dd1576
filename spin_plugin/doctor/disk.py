"""The disk space that the run takes."""

import shutil
from typing import Any

from rich.filesize import decimal

from spin_plugin.args import SpinArgs
from spin_plugin.console import say, warn
from spin_plugin.doctor.data import Lengths
from spin_plugin.doctor.memory import ModelSize
from spin_plugin.doctor.schedule import iterations
from spin_plugin.doctor.settings import Settings
from spin_plugin.run.disk import Space, nearest, require_space
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
    if not writes_model(training, spin):
        model = 4 * size.adapter
    elif settings.opponent.directory:
        model = model_bytes(generation, merges=False)
    else:  # its files are not looked up on the hub: that may download them
        model = size.parameters * (2 if stored in HALF else 4)
    prompts = (min(found.prompts, spin.num_prompts or found.prompts) + found.held_out) if found else 0
    space = bytes_needed(generation, prompts * spin.generation.num_generations, model)
    place = nearest(settings.lowered.run.root)
    require_space(place, space)
    left = max(1, settings.lowered.spin.iterations - settings.lowered.iteration)
    measured = found is None or found.held_out > 0
    needed = whole_run(space, model, settings.lowered.spin, left, measured=measured)
    free = shutil.disk_usage(place).free
    if needed > free >= space.expected:
        warn(
            f"output_dir: {decimal(free)} left on the disk of {place}, but {iterations(left)} may take "
            f"{decimal(needed)}; free some space, set `spin.keep: last` or lower save_total_limit"
        )
    say(f"{decimal(needed)} at most for {iterations(left)} (spin.keep: {spin.keep}), {decimal(free)} free")


def whole_run(space: Space, model: int, spin: SpinArgs, left: int, *, measured: bool) -> int:
    """Return the bytes that the iterations which are left take at most, while the last one is trained.

    What is removed of past ones says `run.keep.mark_removed`.

    Args:
        space: that of one iteration.
        model: its model in bytes.
        spin: the `spin:` block of the run.
        left: number of iterations.
        measured: whether there are held-out pairs, by which one of the iterations is best.
    """
    past = left - 1
    if spin.keep == "all" or (spin.keep == "best" and not (measured or spin.judges or "/" in spin.stop.metric)):
        return past * space.finished + space.expected
    # the last finished one keeps everything; of those before, data and a few models are left
    models = 1 if spin.keep == "last" else 2 + bool(spin.judges)
    before = max(0, past - 1)
    return space.expected + min(past, 1) * space.finished + before * space.data + min(before, models) * model
