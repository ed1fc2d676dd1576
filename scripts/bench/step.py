"""Our training step against TRL's, the official formulation, and the bare work on the same tokens.

    python scripts/bench/step.py [--pairs 8] [--rounds 5] [--threads 2] [--json FILE]
    python scripts/bench/step.py --preset 1b --pairs 32 --json FILE        (one GPU)

Needs torch and transformers; where trl is not installed its side is skipped. All sides work on the same pairs and on
equal random weights. Lengths are log-normal (median prompt 120, real 245, synthetic 200 tokens, sigma 0.6) and cut as
the paper's recipe does it, prompts at 512 tokens and sequences at 1024; every round has pairs of its own, seeded.

    ours      the flat row and the chunked head, plus half a forward for the opponent (once for two epochs)
    padded    the same with the padded form
    trl       DPOTrainer.training_step of the installed trl, at its defaults, with a reference model
    official  re-written from its description: padded to the longest, two forwards, full fp32 log-softmax
    floor     forward and backward of the causal LM loss over the same unique tokens as one row, pairs kept apart

A step is forward and backward; optimizer and collator are in no side. Ratios are medians over interleaved rounds.
Memory is what the first round's step takes on top of the models, in a process of its own; the reference models of
TRL's and the official side come on top of it and are printed beside it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from sides import PAD, SIDES, Batches, Step, draw_pairs, make_model

from spin_plugin.layout import Pair, padded_batch

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"layers": 6, "hidden": 512, "vocab": 32_000, "dtype": "float32"},
    "1b": {"layers": 16, "hidden": 2048, "vocab": 128_256, "dtype": "bfloat16"},  # Llama 3.2 1B's shape
}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16


# --- measuring ---------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> float:
    """Seconds of a step, each part by its share."""
    total = 0.0
    for share, part in step:
        synchronize(device)
        started = time.perf_counter()
        part()
        synchronize(device)
        total += share * (time.perf_counter() - started)
    return total


def measure_times(sides: list[str], options: argparse.Namespace, batches: Batches) -> dict[str, list[float]]:
    """Seconds of the step of every side on every batch but the first, which warms up; rounds interleaved."""
    models = {side: make_model(options) for side in sides}
    steps = {side: SIDES[side](models[side], batches, options.device) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(len(batches)):
        for side in sides:
            models[side].zero_grad()
            seconds[side].append(timed(steps[side][number], options.device))
        shown = ", ".join(f"{side} {values[-1]:.2f} s" for side, values in seconds.items())
        sys.stdout.write(f"{f'round {number}' if number else 'warm-up'}: {shown}\n")
        sys.stdout.flush()
    return {side: values[1:] for side, values in seconds.items()}


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM, the peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure_memory(side: str, options: argparse.Namespace, batches: Batches) -> dict[str, int]:
    """Bytes of the first step on top of the models, and of the models on top of the policy; in a fresh process."""
    cuda = options.device == "cuda"
    model = make_model(options)
    policy = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    step, *_ = SIDES[side](model, batches, options.device)
    models = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    for _, part in step:
        part()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return {"step": peak - models, "reference": models - policy}


def memory_in_own_process(side: str, arguments: list[str]) -> dict[str, int]:
    command = [sys.executable, __file__, *arguments, "--memory-of", side]
    # one arena: with several, how much freed memory lies about would depend on which thread asked for it
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def training_flops(options: argparse.Namespace, pairs: list[Pair]) -> float:
    """Model FLOPs of our step: unique tokens, the head at response tokens alone, half a forward for the opponent."""
    tokens, kept, seen = 0, 0, 0
    for prompt, real, synthetic in (map(len, pair) for pair in pairs):
        tokens, kept = tokens + prompt + real + synthetic, kept + real + synthetic
        seen += (prompt + real) * (prompt + real + 1) // 2 + synthetic * prompt + synthetic * (synthetic + 1) // 2
    model = make_model(argparse.Namespace(**(vars(options) | {"device": "meta"})))
    body = sum(parameter.numel() for layer in model.model.layers for parameter in layer.parameters())
    products = body * tokens + options.vocab * options.hidden * kept + 2 * options.hidden * seen * options.layers
    return 3.5 * 2 * products


def utilisation(seconds: list[float], options: argparse.Namespace, batches: Batches) -> float | None:
    """The median share of the device's peak, where that is known."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    peak = next((flops for device, flops in PEAK_FLOPS.items() if device in name), None)
    if peak is None:
        return None
    return statistics.median(
        training_flops(options, pairs) / second / peak for second, pairs in zip(seconds, batches[1:], strict=True)
    )


# --- the report ----------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    threads = "" if options.device == "cuda" else f", {torch.get_num_threads()} threads"
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl") if find_spec(name))
    return f"{device}{threads}; {packages}; Python {platform.python_version()}"


def summary(
    seconds: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
    options: argparse.Namespace,
    batches: Batches,
) -> dict[str, Any]:
    def time_ratio(of: str, to: str) -> float | None:
        if not {of, to} <= seconds.keys():
            return None
        return round(statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True)), 3)

    def memory_ratio(of: str, to: str) -> float | None:
        return round(memory[of]["step"] / memory[to]["step"], 3) if {of, to} <= memory.keys() else None

    return {
        "ours_vs_trl": time_ratio("trl", "ours"),
        "ours_vs_official": time_ratio("official", "ours"),
        "time_vs_floor": time_ratio("ours", "floor"),
        "memory_vs_trl": memory_ratio("ours", "trl"),
        "memory_vs_official": memory_ratio("ours", "official"),
        "mfu": utilisation(seconds["ours"], options, batches) if "ours" in seconds else None,
        "machine": machine(options),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "memory_of")},
        "unique_tokens": [sum(sum(map(len, pair)) for pair in pairs) for pairs in batches[1:]],
        "padded_tokens": [padded_batch(pairs, PAD)["input_ids"].numel() for pairs in batches[1:]],
        "seconds": seconds,
        "bytes": memory,
    }


def report(result: dict[str, Any], pairs: int) -> Iterator[str]:
    yield result["machine"]
    yield f"unique tokens {result['unique_tokens']}, padded {result['padded_tokens']}"
    yield f"{'side':<10}{'s/step':>9}{'pairs/s':>9}{'GiB/step':>10}{'GiB more models':>17}"
    for side, values in result["seconds"].items():
        seconds, used = statistics.median(values), result["bytes"][side]
        gib = (used["step"] / 2**30, used["reference"] / 2**30)
        yield f"{side:<10}{seconds:>9.3f}{pairs / seconds:>9.2f}{gib[0]:>10.2f}{gib[1]:>17.2f}"
    yield "  ".join(f"{name} {value}" for name, value in result.items() if "_vs_" in name or name == "mfu")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for name in ("layers", "hidden", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    batches = [draw_pairs(options.pairs, options.vocab, seed) for seed in range(1 + options.rounds)]
    if options.memory_of:
        sys.stdout.write(json.dumps(measure_memory(options.memory_of, options, batches[:1])) + "\n")
        return
    sides = [side for side in options.sides if side != "trl" or find_spec("trl")]
    if len(sides) < len(options.sides):
        sys.stdout.write("trl is not installed: its side is skipped\n")
    memory = {side: memory_in_own_process(side, arguments) for side in sides}
    seconds = measure_times(sides, options, batches)
    result = summary(seconds, memory, options, batches)
    sys.stdout.write("\n".join(report(result, options.pairs)) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
