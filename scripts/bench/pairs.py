"""Measure time and memory of building pairs from shards of responses.

    python scripts/bench/pairs.py [--json FILE]

Runs the real code (`Shards`, `build_pairs`) for two sizes, each in a fresh process, on examples and shards written
beforehand: 600 tokens per pair, half of the responses from the previous iteration, as from iteration 1 on. `rss_growth`
compares the peaks of anonymous memory (RssAnon). The total resident size is printed, too; it includes pages of
memory-mapped files, which the kernel drops under memory pressure.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars

from spin_plugin.data.pairs import Synthetic, build_pairs
from spin_plugin.data.table import EXAMPLE_SCHEMA, open_table, table_writer
from spin_plugin.generation.job import SHARD
from spin_plugin.generation.shards import Shards

SIZES = (25_000, 100_000)
PROMPT, REAL, SYNTHETIC = 160, 240, 200  # tokens; 600 per pair
VOCABULARY = 32_000
END = 2


def write_inputs(directory: Path, pairs: int) -> None:
    """Write examples, and shards of two iterations with half of the responses each."""
    rng = np.random.default_rng(0)

    def tokens(count: int, length: int) -> Any:
        return rng.integers(3, VOCABULARY, (count, length), dtype=np.int32)

    examples = pairs // 2
    with table_writer(directory / "examples.arrow", EXAMPLE_SCHEMA) as write:
        for start in range(0, examples, SHARD):
            count = min(SHARD, examples - start)
            rows = [*range(start, start + count)]
            write({"prompt": list(tokens(count, PROMPT)), "real": list(tokens(count, REAL)), "row": rows})
    for iteration in (0, 1):
        shards = Shards(directory / f"synthetic-{iteration}")
        shards.directory.mkdir()
        for number, start in enumerate(range(0, examples, SHARD)):
            sampled = tokens(min(SHARD, examples - start), SYNTHETIC).tolist()
            shards.write(
                number,
                (
                    {
                        "split": "train",
                        "example": start + place,
                        "tokens": [*response, END],
                        "finish": "stop",
                        "stop": END,
                    }
                    for place, response in enumerate(sampled)
                ),
            )


def responses(directory: Path) -> Iterator[Synthetic]:
    for iteration in (1, 0):
        for response in Shards(directory / f"synthetic-{iteration}").responses():
            yield Synthetic(response["example"], iteration, response["tokens"], response["finish"] == "length")


class Peak:
    """Peak RssAnon and VmRSS of this process in MiB, sampled every 5 ms."""

    def __init__(self) -> None:
        self.seen = {"RssAnon": 0.0, "VmRSS": 0.0}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.stopped.wait(0.005):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.seen:
                    self.seen[name] = max(self.seen[name], int(value.split()[0]) / 1024)

    def __enter__(self) -> dict[str, float]:
        self.thread.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


def measure(directory: Path) -> dict[str, float]:
    """Build the pairs of a directory and return time and peak memory."""
    with Peak() as peak:
        seconds, pairs = build(directory)
    return {"pairs": pairs, "seconds": seconds, "own_mib": peak["RssAnon"], "resident_mib": peak["VmRSS"]}


def build(directory: Path) -> tuple[float, int]:
    started = time.perf_counter()
    stats = build_pairs(
        open_table(directory / "examples.arrow"),
        responses(directory),
        directory / "pairs.arrow",
        end_tokens=[END],
        sequence_len=1024,
        keep_equal=False,
    )
    return time.perf_counter() - started, stats.pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bars()
    if options.inside:
        sys.stdout.write(json.dumps(measure(options.inside)))
        return
    results: dict[int, dict[str, float]] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            write_inputs(Path(directory), size)
            command = [sys.executable, __file__, "--inside", directory]
            results[size] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        sys.stdout.write(f"{size:,} pairs: {results[size]}\n")
    small, large = (results[size] for size in SIZES)
    summary = {
        "seconds_100k": large["seconds"],
        "rss_growth": large["own_mib"] / small["own_mib"],
        "time_growth": large["seconds"] / small["seconds"],
        "sizes": results,
    }
    sys.stdout.write(json.dumps({key: summary[key] for key in ("seconds_100k", "rss_growth", "time_growth")}) + "\n")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
