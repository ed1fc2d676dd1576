"""What the first minutes on a GPU have to decide about the core, in one table.

    python scripts/gpu/first_light.py [--json FILE]                  # one GPU; under eight minutes, by estimate
    python scripts/gpu/first_light.py --only attention waits         # some of the checks
    python scripts/gpu/first_light.py --device cpu --quick           # does the program run? Tiny sizes, a minute

Needs torch 2.11 or newer and transformers, and nothing else: no Axolotl, no network, no installation of spin-plugin.
Every check has a process of its own, so that one which breaks the GPU's context, hangs or dies leaves the others alone.
A row says ok, WRONG, or "left out" with the reason; the exit code is 1 where something is WRONG. docs/gpu.md says what
each check decides.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import core
import speed
import torch
import training
import transformers
from cases import Case, Check, Found, Setting

LONGEST = 240.0  # seconds that a case may take before it counts as hanging
VERDICTS = {True: "ok", False: "WRONG", None: "left out"}


@dataclass(frozen=True)
class Row:
    """A case of a check, decided."""

    check: str
    case: str
    verdict: str
    seconds: float
    numbers: dict[str, Any]


# --- a check in its process --------------------------------------------------------------------------


def machine(setting: Setting) -> Iterator[Case]:
    """Not a check: which GPU and which versions the rows below are of."""

    def found() -> Found:
        numbers = {name: version(name) for name in ("torch", "transformers", "triton") if find_spec(name)}
        numbers |= {"Python": platform.python_version(), "device": f"{platform.machine()} CPU"}
        if setting.device == "cuda":
            gpu = torch.cuda.get_device_properties(0)
            peak = speed.bench.peak_flops(gpu.name)
            numbers |= {"device": gpu.name, "capability": f"sm_{gpu.major}{gpu.minor}", "CUDA": torch.version.cuda}
            numbers |= {"GiB": gpu.total_memory / 2**30, "bf16 TFLOPS": peak / 1e12 if peak else "unknown"}
        return Found(True, numbers)

    yield "versions", found


CHECKS: dict[str, Check] = {
    "machine": machine,
    "attention": core.attention,
    "head": core.head,
    "checkpointing": training.checkpointing,
    "compilations": training.compilations,
    "waits": speed.waits,
    "shapes": training.shapes,
    "weights": training.weights,
    "kernels": speed.kernels,
    "steps": speed.steps,
}


def decide(check: str, setting: Setting) -> Iterator[Row]:
    """Rows of a check. A case that raises is WRONG, and the next one has its turn."""
    for case, run in CHECKS[check](setting):
        started = time.perf_counter()
        try:
            right, numbers = run()
        except Exception as error:  # noqa: BLE001 whatever a driver or compiler raises belongs into the table
            first = (str(error).strip() or "no message").splitlines()[0]
            right, numbers = False, {"error": f"{type(error).__name__}: {first}"}
        yield Row(check, case, VERDICTS[right], time.perf_counter() - started, numbers)
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def send_rows(check: str, setting: Setting, sender: Connection) -> None:
    """What a check's process does; its own words go to stderr, not between the rows."""
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    for row in decide(check, setting):
        sender.send(row)
    sender.close()


def rows_of(check: str, setting: Setting) -> Iterator[Row]:
    """Rows of a check as they come from its process, and one that says so where it hangs or dies."""
    context = multiprocessing.get_context("forkserver")  # imports once; its children start without a CUDA context
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(check, setting, sender))
    process.start()
    sender.close()
    fault = None
    try:
        while receiver.poll(LONGEST):
            yield receiver.recv()
        fault = f"no answer in {LONGEST:.0f} seconds"
        process.kill()
    except EOFError:  # it is finished
        pass
    process.join()
    if fault or process.exitcode:
        fault = fault or f"its process ended with exit code {process.exitcode}"
        yield Row(check, "all of it", VERDICTS[False], 0.0, {"error": fault})


# --- the table -----------------------------------------------------------------------------------------


def shown(row: Row) -> str:
    numbers = "  ".join(f"{name} {_short(value)}" for name, value in row.numbers.items() if not isinstance(value, list))
    line = f"{row.check:<14} {row.case:<46} {row.verdict:<9} {row.seconds:>6.1f} s  {numbers}"
    listed = [entry for value in row.numbers.values() if isinstance(value, list) for entry in value]
    return "\n".join([line, *(f"{'':<15}{entry}" for entry in listed)])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only whether everything runs")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if (options.device == "cuda" and not gpu) or (options.device == "auto" and not gpu and not options.quick):
        parser.error("torch sees no GPU; `--device cpu --quick` tries the program without one")
    setting = Setting("cuda" if gpu and options.device != "cpu" else "cpu", options.quick)
    started, rows = time.perf_counter(), []
    for check in options.only:
        for row in rows_of(check, setting):
            rows.append(row)
            sys.stdout.write(shown(row) + "\n")
            sys.stdout.flush()
        if options.json:  # after every check, for whoever stops it
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in VERDICTS.values())
    sys.stdout.write(f"{len(rows)} rows: {counts}; {time.perf_counter() - started:.0f} s\n")
    raise SystemExit(any(row.verdict == VERDICTS[False] for row in rows))


if __name__ == "__main__":
    main()
