"""Does grouping the pairs of a prompt cost accuracy? The tiny run with `group_prompts` off and auto, seed by seed.

    python scripts/bench/grouping.py [--seeds 5] [--iterations 4] [--start DIR] [--runs DIR] [--json FILE]

The start is the SFT model and data of `scripts/quickstart.sh`, by default in outputs/tiny. Runs `axolotl spin train`,
two runs at a time with one thread each, and evaluates held-out prompts. Finished iterations are kept, so it can be
interrupted. Iteration 0 has one pair per prompt, so both runs of a seed are identical there and differ from iteration 1
on. `lower_bound` is the lower end of the 95% confidence interval (one-sided, paired t) of the last iteration's mean
accuracy with grouping minus that without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t

ROOT = Path(__file__).resolve().parents[2]
MODES = ("off", "auto")


def run(directory: Path, seed: int, mode: str, options: argparse.Namespace) -> list[float]:
    """Train and evaluate one run; returns the mean accuracy in percent of each iteration."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = yaml.safe_load((ROOT / "yaml_examples/spin-tiny.yml").read_text(encoding="utf-8"))
    config |= {"base_model": str(options.start / "sft"), "output_dir": str(directory / "run"), "seed": seed}
    config["datasets"][0]["path"] = str(options.start / "data/sft.jsonl")
    config["spin"] |= {"iterations": options.iterations, "group_prompts": mode}
    (directory / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    evaluate = [ROOT / "scripts/tiny/evaluate.py", "--run", directory / "run", "--sft", options.start / "sft"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    with open(directory / "log", "a") as log:
        for command in (
            ["axolotl", "spin", "train", directory / "config.yml"],
            [sys.executable, *evaluate, "--data", options.start / "data/heldout.jsonl"],
        ):
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    summary = json.loads((directory / "run/summary.json").read_text(encoding="utf-8"))
    found = [(entry["in_domain"] + entry["out_of_domain"]) / 2 for entry in summary["iterations"]]
    sys.stdout.write(f"seed {seed}, {mode}: {', '.join(f'{value:.1f}' for value in found)}\n")
    sys.stdout.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--start", type=Path, default=ROOT / "outputs/tiny")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs/grouping")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.start, options.runs = options.start.absolute(), options.runs.absolute()
    units = [(seed, mode) for seed in range(options.seeds) for mode in MODES]
    with ThreadPoolExecutor(2) as pool:
        accuracies = pool.map(lambda unit: run(options.runs / f"{unit[0]}-{unit[1]}", *unit, options), units)
        found = dict(zip(units, accuracies, strict=True))
    assert all(found[seed, "auto"][0] == found[seed, "off"][0] for seed in range(options.seeds)), "not reproducible"
    differences = [found[seed, "auto"][-1] - found[seed, "off"][-1] for seed in range(options.seeds)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    result = {
        "accuracy": {mode: [found[seed, mode] for seed in range(options.seeds)] for mode in MODES},
        "differences": differences,
        "mean": mean,
        "lower_bound": mean - t.ppf(0.95, len(differences) - 1) * error,
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
