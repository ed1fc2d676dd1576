"""first_light.py's measurements of the step: scripts/bench/step.py's sides, a profile, and synchronizations."""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import step as bench
import torch
from cases import Case, Found, Setting, in_bf16, random_pairs, to_device
from sides import BETA, SIDES
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from spin_plugin.model.forward import logps
from spin_plugin.model.layout import shared_prefix_batch
from spin_plugin.objective.losses import Objective, spin_terms
from spin_plugin.objective.metrics import metric_sums

TINY = ["--layers", "1", "--hidden", "128", "--vocab", "500", "--dtype", "bfloat16"]
COMPARED = ("ours", "padded", "official", "floor")
KERNELS = 10


def options_of(setting: Setting, pairs: int) -> Namespace:
    """Return step.py's options for a setting."""
    sizes = [*TINY, "--rounds", "1"] if setting.quick else ["--preset", "1b", "--rounds", "5"]
    options = bench.parse([*sizes, "--pairs", str(pairs), "--device", setting.device])
    options.pairs = pairs
    return options


# --- the sides -----------------------------------------------------------------------------------


def side_row(side: str, pairs: int, setting: Setting, measured: dict[str, dict[str, Any]]) -> Found:
    """Pairs/s, utilization and memory of one side, also stored in `measured` for the ratios."""
    options = options_of(setting, pairs)
    batches = [random_pairs(setting, pairs, options.vocab, seed) for seed in range(1 + options.rounds)]
    used = bench.halve_until_it_fits(partial(bench.measure_memory, side, options, batches[:1]), pairs)
    seconds = bench.measure_times({side: used["micro_batch"]}, options, batches)[side]
    measured[side] = {"seconds": seconds, "bytes": used["step"]}
    numbers = {
        "pairs/s": pairs / statistics.median(seconds),
        "s/step": statistics.median(seconds),
        "MFU": bench.utilization(side, seconds, options, batches) or "unknown peak",
        "GiB": used["step"] / 2**30,
        "GiB more models": used["reference"] / 2**30,
        "pairs at a time": used["micro_batch"],
    }
    return Found(True, numbers)


def ratios_row(measured: dict[str, dict[str, Any]]) -> Found:
    """Median ratios over the rounds, which use the same pairs for every side."""

    def times(of: str, to: str) -> float:
        rounds = zip(measured[of]["seconds"], measured[to]["seconds"], strict=True)
        return statistics.median(one / other for one, other in rounds)

    numbers = {
        "faster than official": times("official", "ours"),
        "than padded": times("padded", "ours"),
        "time of the floor": times("ours", "floor"),
    }
    if measured["official"]["bytes"]:  # a tiny step fits in memory that the process has already reserved
        numbers["memory of official"] = measured["ours"]["bytes"] / measured["official"]["bytes"]
    return Found(True, numbers)


def steps(setting: Setting) -> Iterator[Case]:
    """A step of a 1B model with 8 and 32 pairs. Speed is never WRONG; docs/gpu.md gives the targets."""
    for pairs in (2, 4) if setting.quick else (8, 32):
        measured: dict[str, dict[str, Any]] = {}
        for side in COMPARED:
            yield f"{pairs} pairs, {side}", partial(side_row, side, pairs, setting, measured)
        yield f"{pairs} pairs, ratios", partial(ratios_row, measured)


# --- profile of our step ---------------------------------------------------------------------------


def kernels_row(setting: Setting) -> Found:
    """The kernels (on a CPU, operators) that take most of a step's time."""
    cuda, options = setting.device == "cuda", options_of(setting, 2 if setting.quick else 8)
    pairs = random_pairs(setting, options.pairs, options.vocab)
    warm, step = SIDES["ours"](bench.make_model(options), [pairs, pairs], options)
    bench.timed(warm, setting.device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        bench.timed(step, setting.device)
    taken = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event.key)
        for event in profiler.key_averages()
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
    ]
    total = sum(time for time, _ in taken)
    first = sorted(taken, reverse=True)[:KERNELS]
    slowest = [f"{time / total:6.1%} {time / 1000:9.2f} ms  {name}" for time, name in first]
    return Found(len(slowest) == KERNELS, {"ms of all": total / 1000, "slowest": slowest})


def kernels(setting: Setting) -> Iterator[Case]:
    """Profile of a step."""
    yield "slowest kernels of a step", partial(kernels_row, setting)


def waits_row(setting: Setting) -> Found:
    """Run a step like the trainer's, including metrics, with synchronizations raising errors."""
    if setting.device == "cpu":
        return Found(None, {"left out": "there is no GPU to wait for"})
    options = options_of(setting, 8)
    model = bench.make_model(options)
    SIDES["ours"](model, [], options)  # enables the shared-prefix layout and the chunked head
    batch = to_device(shared_prefix_batch(random_pairs(setting, 8, options.vocab)), setting)

    def step() -> Tensor:
        with in_bf16(setting):
            policy = logps(model, batch)
            terms = spin_terms(policy, policy, batch["sides"], Objective(beta=BETA))
        sums = metric_sums(terms, policy, batch["lengths"], batch["sides"], Objective())
        terms.loss.mean().backward()
        return sums

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Found(True, {"waits": 0, "first loss - ln 2": sums[0].item() / 8 - math.log(2)})


def waits(setting: Setting) -> Iterator[Case]:
    """The host never waits for the GPU within a step: torch raises on any synchronization."""
    yield "forward, loss, metrics, backward", partial(waits_row, setting)
