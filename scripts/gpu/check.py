"""Run gpu_check.sh's configurations ("ways"), as many as the GPUs allow, and print a table of results.

    python scripts/gpu/check.py --gpus N [DIRECTORY] [--only WAY ...]        # gpu_check.sh counts the GPUs

A way is WRONG if its command failed, if the first loss of its last iteration differs from ln 2 by more than 16-bit
rounding explains, or if vLLM and the policy were not compared. `apart` is the largest distance between vLLM and the
policy that the run reports, in nats per token. Finally, our generation is compared with one bare `LLM.generate`.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_configs import WAYS, Way, config_of, make_model_of, write  # noqa: E402

ITERATIONS = 2
MARGIN_NOISE = 1.0  # nats; 16-bit rounding error of the difference of two responses on an H200, see docs/gpu.md
MIN_SPEED_VS_BARE = 0.95
COLUMNS = "{:<16}{:<10}{:>5} {:>9} {:>8} {:>8} {:>9}  {}"


@dataclass(frozen=True)
class Row:
    """Result of a way."""

    way: str
    code: int
    losses: list[float]
    """`spin/loss` of the last iteration's steps."""
    apart: float | None
    wrong: str | None

    def __str__(self) -> str:
        first, last = (f"{self.losses[end]:.4f}" if self.losses else "-" for end in (0, -1))
        apart = "-" if self.apart is None else f"{self.apart:.1g}"
        verdict = "WRONG" if self.wrong else "ok"
        return COLUMNS.format(
            self.way, verdict, self.code, WAYS[self.way].processes, first, last, apart, self.wrong or ""
        )


def first_loss_tolerance(beta: float, pairs: int) -> float:
    """Return the tolerated distance from ln 2 of the mean loss of `pairs` pairs with margin error `MARGIN_NOISE`.

    log(1 + e^-z) = ln 2 - z/2 + z^2/8 - ..., with |z| = beta * noise: three standard deviations of the mean of z/2
    plus the mean of z^2/8.
    """
    size = beta * MARGIN_NOISE
    return 3 * size / 2 / math.sqrt(pairs) + size**2 / 8


def apart_in(log: str) -> float | None:
    """Return the largest distance between vLLM and the policy in a run's log, in nats per token."""
    return max((float(found) for found in re.findall(r"(\d[\d.e+-]*|nan) nats per token", log)), default=None)


def evaluate(way: str, code: int, log: str, losses: list[float], beta: float) -> Row:
    """Return the row of a way.

    Args:
        code: its command's exit code.
        log: the command's output.
        losses: `spin/loss` of the last iteration's steps.
        beta: the way's beta.
    """
    apart, wrong = apart_in(log), None
    if code:
        errors = re.findall(r"^spin: error: (.*)$", log, re.MULTILINE)
        wrong = errors[-1] if errors else f"see {way}.log"
    elif not losses:
        wrong = "no loss was logged"
    elif not abs(losses[0] - math.log(2)) <= first_loss_tolerance(beta, WAYS[way].pairs):
        wrong = "the first loss is not ln 2"
    elif apart is None:
        wrong = "vLLM and the policy were not compared"
    return Row(way, code, losses, apart, wrong)


def left_out(gpus: int) -> dict[str, Way]:
    return {name: way for name, way in WAYS.items() if way.gpus > gpus}


def run(way: str, directory: Path) -> Row:
    """Run two iterations of a way; finished ones are skipped."""
    make_model_of(directory, way)
    log, metrics = directory / f"{way}.log", directory / way / f"iteration-{ITERATIONS - 1}" / "metrics.jsonl"
    command = [ROOT / "scripts/iterate.sh", directory / f"{way}.yml"]
    with open(log, "w", encoding="utf-8") as out:
        arguments = ["--verbose", "--", "--num_processes", str(WAYS[way].processes)]
        done = subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False)
    entries = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [entry["spin/loss"] for entry in entries if "spin/loss" in entry]
    beta = config_of(directory, way)["spin"].get("beta", 0.1)
    return evaluate(way, done.returncode, log.read_text(encoding="utf-8", errors="replace"), losses, beta)


def generation(directory: Path) -> tuple[str, bool]:
    """Compare our generation with one bare `LLM.generate` at 1,024 sequences.

    Returns:
        A line with the result, and whether ours is as fast.
    """
    make_model_of(directory, "real-size")
    result, log = directory / "generation.json", directory / "generation.log"
    program = [sys.executable, ROOT / "scripts/bench/generate.py", "--unseeded", "--model", directory / "1b"]
    with open(log, "w", encoding="utf-8") as out:
        done = subprocess.run([*program, "--json", result], stdout=out, stderr=out, check=False)
    if done.returncode:
        return f"generation WRONG: see {log}", False
    return evaluate_speed(json.loads(result.read_text()))


def evaluate_speed(found: dict[str, Any]) -> tuple[str, bool]:
    """Like `generation`, from the measurements of generate.py."""
    fast = found["vs_bare"] >= MIN_SPEED_VS_BARE
    line = f"ours / bare {found['vs_bare']:.3f}, bare without seeds / bare {found['unseeded_vs_bare']:.3f}"
    return f"generation {'ok' if fast else f'WRONG (below {MIN_SPEED_VS_BARE})'}: {line}", fast


def table(options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Yield each line of the table as soon as it is available, with whether it is right."""
    missing = left_out(options.gpus)
    yield COLUMNS.format("way", "", "exit", "processes", "first", "last", "apart", ""), True
    for way in options.only:
        if way in missing:
            continue
        row = run(way, options.directory)
        yield str(row), row.wrong is None
    if set(options.only) == set(WAYS):
        yield generation(options.directory)
    if absent := [f"{way} ({missing[way].gpus} GPUs)" for way in options.only if way in missing]:
        yield f"left out because this machine has {options.gpus} GPU(s): {', '.join(absent)}", True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "outputs/gpu-check")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    options.directory = options.directory.resolve()
    write(options.directory)
    right = True
    for line, fine in table(options):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        right &= fine
    raise SystemExit(not right)


if __name__ == "__main__":
    main()
