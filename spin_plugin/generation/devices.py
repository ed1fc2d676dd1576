"""The number of engines, and the GPUs or CPU cores that each one runs on."""

import os
from dataclasses import dataclass, field

from spin_plugin.console import SpinError


@dataclass(frozen=True)
class Placement:
    """GPUs or CPU cores of one engine."""

    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that select its GPUs or limit its threads."""
    cores: list[int] | None = None
    """Cores to bind to; None: all."""


def placements(engines: int | None, gpus_each: int) -> list[Placement]:
    """Return a placement for each engine.

    Args:
        engines: number of engines; None: one for every `gpus_each` visible GPUs, or one on the CPU.
        gpus_each: GPUs of one engine (tensor-parallel size times pipeline-parallel size).

    Raises:
        SpinError: more GPUs are requested than are visible.
    """
    gpus = visible_gpus()
    if not gpus:
        return _on_cores(engines or 1, gpus_each)
    groups = [gpus[start : start + gpus_each] for start in range(0, len(gpus) - gpus_each + 1, gpus_each)]
    if len(groups) < (engines or 1):
        key = "data_parallel_size" if gpus_each <= len(gpus) else "tensor_parallel_size"
        raise SpinError(
            f"vllm.{key}: {engines or 1} engines with {gpus_each} GPUs each are requested, "
            f"but {len(gpus)} GPUs are visible; lower it"
        )
    return [Placement({"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups[:engines]]


def visible_gpus() -> list[str]:
    """Return the GPUs of this process, named as in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _on_cores(engines: int, workers: int) -> list[Placement]:
    """Give each engine its own cores: two engines that share a core run ten times slower."""
    if engines == 1 or not hasattr(os, "sched_getaffinity"):
        return [Placement()] * engines
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // engines)
    placed = []
    for engine in range(engines):
        own = [cores[number % len(cores)] for number in range(engine * share, (engine + 1) * share)]
        environment = {"OMP_NUM_THREADS": str(share)}
        if workers == 1:  # a single worker: vLLM binds its threads to this list
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own))
        placed.append(Placement(environment, own))
    return placed
