"""What an iteration's entry in run.json says about how it ran: time and tokens, precision, versions."""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spin_plugin.config.specs import OpponentSpec, TrainingSpec
from spin_plugin.generation.shards import Shards
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.iteration import IterationDir
from spin_plugin.training.precision import keeps_masters

PACKAGES = ("spin-plugin", "axolotl", "torch", "transformers", "accelerate", "peft", "datasets", "deepspeed")


def read_measured(file: Path) -> dict[str, Any]:
    """Return what was measured before the first step; empty if nothing was."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def add_measured(file: Path, name: str, value: Any) -> None:
    """Store a measurement made before the first step, because a resumed run cannot repeat it."""
    write_atomically(file, json.dumps(read_measured(file) | {name: value}, indent=2) + "\n")


def measured(directory: IterationDir, training: TrainingSpec, opponent: OpponentSpec) -> dict[str, Any]:
    """Return the parts of the iteration's entry in run.json that its files and configuration contain.

    Returns:
        `stages`, `precision`, `versions` and, if vLLM and the policy were compared, `agreement`.
    """
    manifest, stored = Shards(directory.synthetic).manifest() or {}, read_measured(directory.measured)
    agreement = {"agreement": stored["agreement"]} if "agreement" in stored else {}
    return agreement | {
        "stages": stages(manifest, stored, directory.read_log()),
        "precision": precision(training, opponent, manifest.get("engine", {}).get("dtype")),
        "versions": versions(manifest),
    }


def stages(
    manifest: Mapping[str, Any], stored: Mapping[str, Any], log: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Return seconds and tokens of each stage; tokens without padding, by all ranks.

    - `generate`: from the first engine that is ready to the last response; tokens of the responses. If generation was
      resumed, of the last start alone.
    - `score`: the opponent's log-probs; if that was resumed, of the last start alone.
    - `train`: the steps that the model has learned from, with evaluations and checkpoints between them. What a kill
      lost, and steps after the last log entry, do not count.
    """
    found = {"generate": manifest.get("generated"), "score": stored.get("score"), "train": _sum(log)}
    return {
        stage: {"seconds": round(part["seconds"], 3), "tokens": int(part["tokens"])}
        for stage, part in found.items()
        if part
    }


def _sum(log: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    timed = [entry for entry in log if "seconds" in entry]
    return {name: sum(entry[name] for entry in timed) for name in ("seconds", "tokens")} if timed else None


def precision(training: TrainingSpec, opponent: OpponentSpec, vllm: str | None) -> str:
    """Return in a few words how numbers were stored and computed, for example `bfloat16 with fp32 masters`.

    Args:
        training: the iteration's training.
        opponent: the model it starts from.
        vllm: vLLM's dtype.
    """
    said = "fp8" if opponent.fp8 else training.dtype
    if training.adapter:
        base = "quantized base" if opponent.quantized else "base"
        said += f" {base}, adapter in {training.dtype if training.adapter_in_model_dtype else 'float32'}"
    elif keeps_masters(training):
        said += f" with fp32 masters{' of DeepSpeed' if training.deepspeed else ''}"
    return said + (f"; vLLM {vllm.removeprefix('torch.')}" if vllm else "")


def versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the packages that determine the result; vLLM's from the job's `manifest`."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # optional, or the checkout is on the path without being installed
            continue
    return found | ({"vllm": str(manifest["vllm"])} if "vllm" in manifest else {})
