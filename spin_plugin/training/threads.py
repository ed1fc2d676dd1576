"""The cores that training uses on a machine without a GPU."""

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from spin_plugin.run.processes import launcher

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period


def use_all_cores() -> None:
    """Without a GPU, train on all cores unless the user has chosen the number of threads.

    By default, `accelerate launch` sets OMP_NUM_THREADS to 1. This changes the threads of this process only: vLLM's
    worker inherits the environment and keeps its own choice.
    """
    process = launcher()
    if process is None or torch.accelerator.is_available() or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    with suppress(psutil.Error):
        option = any("num_cpu_threads_per_process" in word.replace("-", "_") for word in process.cmdline())
        if option or "OMP_NUM_THREADS" in process.environ():  # as the launcher was started, before it set the variable
            return
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def cores() -> int:
    """Return how many physical cores this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = min(available, psutil.cpu_count(logical=False) or available)
    with suppress(OSError, ValueError):  # no container, or no limit
        quota, period = map(int, QUOTA.read_text().split())
        available = min(available, quota // period)
    return max(1, available)
