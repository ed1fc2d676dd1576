"""The disk of a run: where it is, and whether it has space for an iteration."""

import shutil
from pathlib import Path
from typing import NamedTuple

from spin_plugin.console import SpinError, warn


class Space(NamedTuple):
    """Bytes that an iteration writes: at least `minimum`, at most about `expected`."""

    minimum: int
    expected: int
    finished: int = 0
    """What of it is left at its end, with checkpoints."""
    data: int = 0
    """Of that, responses and pairs."""


def nearest(directory: Path) -> Path:
    """Return the directory or its nearest existing parent."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory


def require_space(directory: Path, needed: Space) -> None:
    """Warn if the disk may fill up, raise if it certainly will.

    Raises:
        SpinError: the free space is less than the iteration certainly writes.
    """
    free = shutil.disk_usage(directory).free
    if free < needed.minimum:
        raise SpinError(
            f"output_dir: {free / 1e9:.1f} GB left on the disk of {directory}, but this iteration's model needs "
            f"{needed.minimum / 1e9:.1f} GB; free some space or use an output_dir on another disk"
        )
    if free < needed.expected:
        warn(
            f"output_dir: {free / 1e9:.1f} GB left on the disk of {directory}, but this iteration may write "
            f"{needed.expected / 1e9:.1f} GB including checkpoints; free some space or lower save_total_limit"
        )
