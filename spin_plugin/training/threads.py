"""The cores that training uses on a machine without a GPU."""

import os
from contextlib import suppress

import psutil
import torch

from spin_plugin.run.processes import launcher


def use_all_cores() -> None:
    """Without a GPU, train on all cores: `accelerate launch` allows one unless the user has set OMP_NUM_THREADS.

    Sets the threads of this process only. vLLM's worker inherits the environment, where nothing changes.
    """
    if torch.accelerator.is_available() or (process := launcher()) is None:
        return
    with suppress(psutil.Error):
        if "OMP_NUM_THREADS" not in process.environ():  # as the launcher was started, before it set the variable
            cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
