"""Measure how long the report of a large run takes, and how large it becomes.

    python scripts/bench/report.py [--pairs 50000] [--iterations 4] [--json FILE]

Writes a run directory in the formats of a real one, without training: prompts of 100 tokens, responses of 150 to 450
tokens, about five characters each, a fifth of them equal to the real ones. Then runs `axolotl spin report` on it, as
a user does: a process of its own, started cold.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

WORDS = 4000
HELD_OUT = 0.02


def build(directory: Path, pairs: int, iterations: int) -> None:
    """Write the run, in a process of its own: the peak of a child's memory starts at what its parent has loaded."""
    from reported import END, Examples, Tokens, make_run
    from tiny import byte_tokenizer

    rng = np.random.default_rng(0)
    tokenizer = byte_tokenizer()
    first = len(tokenizer)
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    tokenizer.add_tokens([f" {''.join(rng.choice(letters, 4))}{number}" for number in range(WORDS)])

    def words(length: int) -> Tokens:
        return rng.integers(first, first + WORDS, length).tolist()

    def response() -> Tokens:
        return [*words(int(rng.integers(150, 450))), END]

    def examples(count: int) -> list[tuple[Tokens, Tokens]]:
        return [(words(100), response()) for _ in range(count)]

    held_out = int(pairs * HELD_OUT)
    both = Examples(examples(pairs - held_out), examples(held_out))

    def answer(split: str, example: int, _iteration: int) -> list[Tokens]:
        return [getattr(both, split)[example][1] if rng.random() < 0.2 else response()]

    make_run(directory / "run", tokenizer, both, answer, iterations=iterations)


def measure(directory: Path) -> dict[str, Any]:
    """Run the command; returns its seconds, its peak memory and the sizes of its files in MB."""
    command = [sys.executable, "-m", "spin_plugin.cli", "report", str(directory / "config.yml")]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
    if status:
        raise SystemExit(1)
    sizes = {
        f"{kind}_mb": (directory / f"run/report.{kind}").stat().st_size / 1e6 for kind in ("html", "json", "jsonl")
    }
    return {"seconds": seconds, "peak_rss_mb": peak / 1e6, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        builder = Process(target=build, args=(directory, options.pairs, options.iterations))
        builder.start()
        builder.join()
        run_mb = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
        result = {"pairs": options.pairs, "iterations": options.iterations, "run_mb": run_mb, **measure(directory)}
    result = {name: round(value, 2) for name, value in result.items()}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
