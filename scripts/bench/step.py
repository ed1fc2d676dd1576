"""Compare our training step with TRL's, the official formulation, and the bare minimum on the same tokens.

    python scripts/bench/step.py [--pairs 8] [--rounds 5] [--threads 2] [--json FILE]
    python scripts/bench/step.py --preset 1b --pairs 8 32 --json FILE      (one GPU)
    python scripts/bench/step.py --responses 2 --sides ours pairs unpadded padded logits official trl trl_precomputed

Needs torch and transformers (and PYTHONPATH=. if spin-plugin is not installed); without trl its side is skipped.
`--dtype bfloat16`, the default of `--preset 1b`, matches training: fp32 weights, bf16 matmuls. All sides use the same
pairs and the same random weights. Lengths are log-normal (median prompt 120, real 245, synthetic 200 tokens, sigma 0.6)
and truncated as in the paper's recipe, prompts at 512 and sequences at 1024 tokens. Each round has its own pairs.

    ours      shared-prefix layout and chunked head, plus half a forward for the opponent (scored once for two epochs);
              with `--responses`, all synthetic responses of a prompt in one row
    pairs     the same with a row per pair
    unpadded  the same with one row of separate sequences, so that nothing is shared
    padded    the same with the padded layout
    logits    the same with all logits at once instead of the chunked head
    trl       DPOTrainer.training_step of the installed trl, at its defaults, with a reference model
    trl_precomputed  the same with `precompute_ref_log_probs`, plus half a forward
    official  reimplemented from its description: padded to the longest, two forwards, full fp32 log-softmax
    floor     forward and backward of the causal LM loss on the same unique tokens in one row, pairs kept apart

`factors` splits the median time of TRL over ours into steps from each side to the next; their product is the whole.

A step is forward and backward, without optimizer and collator. Ratios are medians over rounds, which are interleaved on
a CPU. Memory is that of the first round's step on top of the models, measured in its own process; the reference models
of the TRL and official sides are printed separately. If a step does not fit in GPU memory, the side halves its
micro-batches until it does. MFU counts only the FLOPs needed for the unique tokens, relative to the GPU's peak.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from sides import PAD, SIDES, Batches, Step, make_model, sample_pairs

from spin_plugin.model.layout import Pair, groups_of, padded_batch, shared_prefix_batch

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"layers": 6, "hidden": 512, "vocab": 32_000, "dtype": "float32"},
    "1b": {"layers": 16, "hidden": 2048, "vocab": 128_256, "dtype": "bfloat16"},  # Llama 3.2 1B's shape
}
# What each side lacks that the next one has.
FACTORS = {
    "trl": "implementation", "official": "half a reference forward", "logits": "head", "padded": "no padding",
    "unpadded": "a row per pair", "pairs": "a row per prompt", "ours": "",
}  # fmt: skip
DEFAULT_SIDES = ("ours", "padded", "trl", "official", "floor")
# Dense bf16 FLOPS with fp32 accumulation from the data sheets, by part of the GPU's name; the first match wins.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


# --- measuring ---------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> float:
    """Return the seconds of a step, its parts weighted."""
    total = 0.0
    for share, part in step:
        synchronize(device)
        started = time.perf_counter()
        part()
        synchronize(device)
        total += share * (time.perf_counter() - started)
    return total


def steps_of(side: str, model: Any, batches: Batches, options: argparse.Namespace, micro_batch: int) -> list[Step]:
    """Return a side's step for every batch, split into micro-batches of `micro_batch` pairs."""
    parts = [pairs[first : first + micro_batch] for pairs in batches for first in range(0, len(pairs), micro_batch)]
    steps, each = SIDES[side](model, parts, options), len(parts) // len(batches)
    return [list(chain(*steps[first : first + each])) for first in range(0, len(steps), each)]


def measure_times(sizes: dict[str, int], options: argparse.Namespace, batches: Batches) -> dict[str, list[float]]:
    """Measure the seconds of every side's step on every batch but the first, a warm-up. Rounds are interleaved.

    Args:
        sizes: pairs per micro-batch of each side.
    """
    models = {side: make_model(options) for side in sizes}
    steps = {side: steps_of(side, models[side], batches, options, size) for side, size in sizes.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sizes}
    for number in range(len(batches)):
        for side in sizes:
            seconds[side].append(timed(steps[side][number], options.device))
            models[side].zero_grad()
        shown = ", ".join(f"{side} {values[-1]:.2f} s" for side, values in seconds.items())
        sys.stdout.write(f"{f'round {number}' if number else 'warm-up'}: {shown}\n")
        sys.stdout.flush()
    return {side: values[1:] for side, values in seconds.items()}


def resident(field: str) -> int:
    """Return VmRSS, or the peak VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure_memory(side: str, options: argparse.Namespace, batches: Batches, micro_batch: int) -> dict[str, int]:
    """Measure bytes of the first step on top of the models, and of models besides the policy; in a fresh process."""
    cuda = options.device == "cuda"
    model = make_model(options)
    policy = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    step, *_ = steps_of(side, model, batches, options, micro_batch)
    models = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    for _, part in step:
        part()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return {"step": peak - models, "reference": models - policy, "micro_batch": micro_batch}


def halve_until_it_fits(measure: Callable[[int], dict[str, int]], micro_batch: int) -> dict[str, int]:
    """Measure with micro-batches of `micro_batch` pairs, halved until the step fits in GPU memory."""
    while micro_batch > 1:
        with suppress(torch.OutOfMemoryError):
            return measure(micro_batch)
        gc.collect()  # the failed attempt's models
        torch.cuda.empty_cache()
        micro_batch //= 2
    return measure(1)


def memory_in_own_process(side: str, pairs: int, arguments: list[str]) -> dict[str, int]:
    command = [sys.executable, __file__, *arguments, "--pairs", str(pairs), "--memory-of", side]
    # one arena: with several, the amount of retained freed memory depends on thread scheduling
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def training_flops(options: argparse.Namespace, pairs: list[Pair], passes: float) -> float:
    """Return the model FLOPs of `passes` passes over the unique tokens, with the head only at response tokens."""
    tokens, kept, seen = 0, 0, 0
    for group in groups_of(pairs, grouped=True):
        prompt, real, synthetic = len(group.prompt), len(group.real), [len(response) for response in group.synthetic]
        tokens, kept = tokens + prompt + real + sum(synthetic), kept + real + sum(synthetic)
        seen += (prompt + real) * (prompt + real + 1) // 2
        seen += sum(length * prompt + length * (length + 1) // 2 for length in synthetic)
    model = make_model(argparse.Namespace(**(vars(options) | {"device": "meta"})))
    body = sum(parameter.numel() for layer in model.model.layers for parameter in layer.parameters())
    products = body * tokens + options.vocab * options.hidden * kept + 2 * options.hidden * seen * options.layers
    return passes * 2 * products


def peak_flops(name: str) -> float | None:
    """Return a GPU's dense bf16 peak by its name, or None if unknown."""
    return next((flops for device, flops in PEAK_FLOPS.items() if device in name), None)


def utilization(side: str, seconds: list[float], options: argparse.Namespace, batches: Batches) -> float | None:
    """Return the median share of the device's peak, or None if that is unknown."""
    peak = peak_flops(torch.cuda.get_device_name()) if options.device == "cuda" else None
    if peak is None:
        return None
    passes = 3.0 if side == "floor" else 3.5  # half a forward for the opponent
    return statistics.median(
        training_flops(options, pairs, passes) / second / peak
        for second, pairs in zip(seconds, batches[1:], strict=True)
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

    medians = {side: statistics.median(values) for side, values in seconds.items()}
    sides = list(FACTORS) if medians.keys() >= FACTORS.keys() else []
    return {
        "ours_vs_trl": time_ratio("trl", "ours"),
        "ours_vs_trl_precomputed": time_ratio("trl_precomputed", "ours"),
        "grouped_vs_pairs": time_ratio("pairs", "ours"),
        "memory_vs_pairs": memory_ratio("ours", "pairs"),
        "factors": {FACTORS[slower]: round(medians[slower] / medians[faster], 3) for slower, faster in pairwise(sides)},
        "ours_vs_official": time_ratio("official", "ours"),
        "time_vs_floor": time_ratio("ours", "floor"),
        "memory_vs_trl": memory_ratio("ours", "trl"),
        "memory_vs_official": memory_ratio("ours", "official"),
        "mfu": {side: utilization(side, values, options, batches) for side, values in seconds.items()},
        "machine": machine(options),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "memory_of")},
        "unique_tokens": [shared_prefix_batch(pairs, grouped=True)["input_ids"].numel() for pairs in batches[1:]],
        "padded_tokens": [padded_batch(pairs, PAD)["input_ids"].numel() for pairs in batches[1:]],
        "seconds": seconds,
        "median_seconds": medians,
        "pairs_per_second": {side: options.pairs / median for side, median in medians.items()},
        "bytes": memory,
        "step_gib": {side: used["step"] / 2**30 for side, used in memory.items()},
    }


def report(result: dict[str, Any], pairs: int) -> Iterator[str]:
    yield result["machine"]
    yield f"unique tokens {result['unique_tokens']}, padded {result['padded_tokens']}"
    sizes, speeds = f"{'side':<16}{'pairs':>6}{'of':>4}", f"{'s/step':>9}{'pairs/s':>9}{'MFU':>6}"
    yield f"{sizes}{speeds}{'GiB/step':>10}{'GiB more models':>17}"
    for side, seconds in result["median_seconds"].items():
        used, mfu, speed = result["bytes"][side], result["mfu"][side], result["pairs_per_second"][side]
        gib, share = (result["step_gib"][side], used["reference"] / 2**30), "-" if mfu is None else f"{mfu:.0%}"
        sizes = f"{side:<16}{used['micro_batch']:>6}{pairs:>4}"
        yield f"{sizes}{seconds:>9.3f}{speed:>9.2f}{share:>6}{gib[0]:>10.2f}{gib[1]:>17.2f}"
    yield "  ".join(f"{name} {value}" for name, value in result.items() if "_vs_" in name and value is not None)
    if result["factors"]:
        yield " × ".join(f"{name} {value}" for name, value in result["factors"].items())


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8], help="pairs per step; one table per number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for name in ("layers", "hidden", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all sides")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--responses", type=int, default=1, help="synthetic responses per prompt; divides --pairs")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, help="default: all if --responses > 1, else the usual ones"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.sides is None:
        options.sides = list(SIDES if options.responses > 1 else DEFAULT_SIDES)
    if any(pairs % options.responses for pairs in options.pairs):
        parser.error("--responses must divide --pairs")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def run(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Measure all sides with `options.pairs` pairs and print the results."""
    batches = [
        sample_pairs(options.pairs, options.vocab, seed, options.responses) for seed in range(1 + options.rounds)
    ]
    memory = {side: memory_in_own_process(side, options.pairs, arguments) for side in options.sides}
    sizes = {side: used["micro_batch"] for side, used in memory.items()}
    # On a GPU one after the other: all models at once would not leave the memory that each was measured with.
    groups = [{side: size} for side, size in sizes.items()] if options.device == "cuda" else [sizes]
    seconds: dict[str, list[float]] = {}
    for group in groups:
        seconds |= measure_times(group, options, batches)
    result = summary(seconds, memory, options, batches)
    sys.stdout.write("\n".join(report(result, options.pairs)) + "\n")
    return result


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    each = [argparse.Namespace(**(vars(options) | {"pairs": pairs})) for pairs in options.pairs]
    if options.memory_of:
        batches = [sample_pairs(each[0].pairs, options.vocab, 0, options.responses)]
        measure = partial(measure_memory, options.memory_of, each[0], batches)
        sys.stdout.write(json.dumps(halve_until_it_fits(measure, each[0].pairs)) + "\n")
        return
    sides = [side for side in options.sides if not side.startswith("trl") or find_spec("trl")]
    if len(sides) < len(options.sides):
        sys.stdout.write("trl is not installed, side skipped\n")
    results = []
    for one in each:
        one.sides = sides
        results.append(run(one, arguments))
    if options.json:
        content = results[0] if len(results) == 1 else {"runs": results}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
