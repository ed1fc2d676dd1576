"""Check the core on a GPU in a few minutes and print one table.

    python scripts/gpu/first_light.py [--json FILE]                  # one GPU; estimated at under eight minutes
    python scripts/gpu/first_light.py --only attention waits         # some of the checks
    python scripts/gpu/first_light.py --device cpu --quick           # test the program itself: tiny sizes, one minute

Needs only torch 2.11 or newer and transformers: no Axolotl, no network, no installation of spin-plugin. Each check has
its own process, so that one that crashes, hangs or corrupts its CUDA context does not affect the others. A row says ok,
WRONG, or "left out" with the reason; the exit code is 1 if any row is WRONG. docs/gpu.md describes the checks.
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

CASE_TIMEOUT = 240.0  # seconds
VERDICTS = {True: "ok", False: "WRONG", None: "left out"}


@dataclass(frozen=True)
class Row:
    """Result of one case of a check."""

    check: str
    case: str
    verdict: str
    seconds: float
    numbers: dict[str, Any]


# --- running a check -----------------------------------------------------------------------------------


def machine(setting: Setting) -> Iterator[Case]:
    """Not a check: report the GPU and the package versions."""

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


def run_check(check: str, setting: Setting) -> Iterator[Row]:
    """Yield a check's rows. A case that raises is WRONG; the next one still runs."""
    for case, run in CHECKS[check](setting):
        started = time.perf_counter()
        try:
            right, numbers = run()
        except Exception as error:  # noqa: BLE001 any driver or compiler error goes into the table
            first = (str(error).strip() or "no message").splitlines()[0]
            right, numbers = False, {"error": f"{type(error).__name__}: {first}"}
        yield Row(check, case, VERDICTS[right], time.perf_counter() - started, numbers)
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def send_rows(check: str, setting: Setting, sender: Connection) -> None:
    """Run a check in its own process, with stdout redirected to stderr to keep the table clean."""
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    for row in run_check(check, setting):
        sender.send(row)
    sender.close()


def rows_of(check: str, setting: Setting) -> Iterator[Row]:
    """Yield a check's rows as its process sends them, and a WRONG row if the process hangs or crashes."""
    context = multiprocessing.get_context("forkserver")  # imports once; children start without a CUDA context
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(check, setting, sender))
    process.start()
    sender.close()
    fault = None
    try:
        while receiver.poll(CASE_TIMEOUT):
            yield receiver.recv()
        fault = f"no answer in {CASE_TIMEOUT:.0f} seconds"
        process.kill()
    except EOFError:  # finished
        pass
    process.join()
    if fault or process.exitcode:
        fault = fault or f"its process exited with code {process.exitcode}"
        yield Row(check, "all of it", VERDICTS[False], 0.0, {"error": fault})


# --- the table -----------------------------------------------------------------------------------------


def format_row(row: Row) -> str:
    numbers = "  ".join(f"{name} {_short(value)}" for name, value in row.numbers.items() if not isinstance(value, list))
    line = f"{row.check:<14} {row.case:<46} {row.verdict:<9} {row.seconds:>6.1f} s  {numbers}"
    listed = [entry for value in row.numbers.values() if isinstance(value, list) for entry in value]
    return "\n".join([line, *(f"{'':<15}{entry}" for entry in listed)])


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to test that everything runs")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if (options.device == "cuda" and not gpu) or (options.device == "auto" and not gpu and not options.quick):
        parser.error("torch sees no GPU; use `--device cpu --quick` to test the program without one")
    setting = Setting("cuda" if gpu and options.device != "cpu" else "cpu", options.quick)
    started, rows = time.perf_counter(), []
    for check in options.only:
        for row in rows_of(check, setting):
            rows.append(row)
            sys.stdout.write(format_row(row) + "\n")
            sys.stdout.flush()
        if options.json:  # after every check, so that an interrupted run keeps its rows
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in VERDICTS.values())
    sys.stdout.write(f"{len(rows)} rows: {counts}; {time.perf_counter() - started:.0f} s\n")
    raise SystemExit(any(row.verdict == VERDICTS[False] for row in rows))


if __name__ == "__main__":
    main()
