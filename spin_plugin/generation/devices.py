"""How many engines draw side by side, and which part of the machine each of them gets."""

import os
from dataclasses import dataclass, field

from spin_plugin.console import SpinError


@dataclass(frozen=True)
class Placement:
    """What one engine runs on."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables that name its GPUs, or its share of the cores."""
    cores: list[int] | None = None
    """The cores it is bound to; None: all."""


def placements(engines: int | None, gpus_each: int) -> list[Placement]:
    """One place for each engine: by default one for every `gpus_each` visible GPUs, or one without a GPU.

    Raises:
        SpinError: more GPUs are asked for than are visible.
    """
    gpus = visible_gpus()
    if not gpus:
        return _on_cores(engines or 1, gpus_each)
    groups = [gpus[start : start + gpus_each] for start in range(0, len(gpus) - gpus_each + 1, gpus_each)]
    if len(groups) < (engines or 1):
        key = "data_parallel_size" if gpus_each <= len(gpus) else "tensor_parallel_size"
        raise SpinError(
            f"vllm.{key}: {engines or 1} engines of {gpus_each} GPUs each are wanted, "
            f"{len(gpus)} GPUs are visible; lower it"
        )
    return [Placement({"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups[:engines]]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _on_cores(engines: int, workers: int) -> list[Placement]:
    """Two engines that share a core slow each other down tenfold, so each gets its own."""
    if engines == 1 or not hasattr(os, "sched_getaffinity"):
        return [Placement()] * engines
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // engines)
    found = []
    for engine in range(engines):
        own = [cores[number % len(cores)] for number in range(engine * share, (engine + 1) * share)]
        environment = {"OMP_NUM_THREADS": str(share)}
        if workers == 1:  # where the engine is a process of its own, vLLM binds it by this list
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own))
        found.append(Placement(environment, own))
    return found
