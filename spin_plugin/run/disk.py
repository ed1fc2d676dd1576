"""Whether the disk has room for an iteration, asked before the work rather than after it."""

import shutil
from pathlib import Path
from typing import NamedTuple

from spin_plugin.console import SpinError, warn


class Space(NamedTuple):
    """Bytes that an iteration writes."""

    sure: int
    likely: int


def require_space(directory: Path, needed: Space) -> None:
    """Warn where the disk may become full, refuse where it is sure to.

    Raises:
        SpinError: not even what is sure to be written has room.
    """
    free = shutil.disk_usage(directory).free
    if free < needed.sure:
        raise SpinError(
            f"output_dir: the disk of {directory} has {free / 1e9:.1f} GB left and the model that comes out of this "
            f"iteration needs {needed.sure / 1e9:.1f}; free some space or use an output_dir on another disk"
        )
    if free < needed.likely:
        warn(
            f"the disk of {directory} has {free / 1e9:.1f} GB left and this iteration may write "
            f"{needed.likely / 1e9:.1f} GB with its checkpoints; "
            "free some space, or lower save_total_limit"
        )
