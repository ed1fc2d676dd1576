"""`axolotl spin train`: all iterations, one `axolotl train` each."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import psutil

from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import INTERRUPTED, SpinError, exit_in_one_line, say

# Without it `accelerate launch` adds a stack trace of its own to the one-line error of the command below it.
QUIET = ("--", "--quiet")


@click.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@click.option("--iterations", type=click.IntRange(min=1), help="How many to train now; all that are left if not given.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS OF AXOLOTL TRAIN]")
@exit_in_one_line
def train(config: Path, iterations: int | None, arguments: tuple[str, ...]) -> None:
    """Train the iterations that CONFIG has left, each in an `axolotl train` of its own. After any crash, run it again.

    \b
    axolotl spin train config.yml --iterations 1
    axolotl spin train config.yml -- --num_processes 8
    axolotl spin train config.yml -- --launcher torchrun -- --nproc_per_node=8
    """
    finished, total = progress(config)
    goal = min(total, finished + iterations) if iterations else total
    if finished >= total:
        say(f"all {total} iterations of {config} are finished")
    while finished < goal:
        code = _run([_axolotl(), "train", str(config), *(arguments or QUIET)])
        if code:
            raise SystemExit(code)
        before, (finished, total) = finished, progress(config)
        if finished == before:  # Axolotl answers an interrupt by exit code 0
            raise SpinError(f"iteration {before} was not finished; run the same command again to continue it")


def progress(config: Path) -> tuple[int, int]:
    """How many iterations are finished, and how many there are to be."""
    args, run = read_config(config)
    return run.finished(), args.iterations


def _axolotl() -> str:
    """The command of this environment, active or not."""
    own = Path(sys.executable).with_name("axolotl")
    found = str(own) if own.exists() else shutil.which("axolotl")
    if found is None:
        raise SpinError("the command `axolotl` is not on PATH; activate its environment")
    return found


def _run(command: list[str]) -> int:
    """The exit code of a command, which gets the signal by which Docker and Slurm end a job."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `axolotl train` starts accelerate
    received: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        with subprocess.Popen(command, env=os.environ | {"PATH": path}) as child:
            try:
                while (code := _wait(child)) is None and not received:
                    pass
                if received:
                    _end_family(child)
            except KeyboardInterrupt:  # the terminal has sent it to the child, too
                child.wait()
                return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, earlier)
    if received:
        return 128 + received[0]
    assert code is not None
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a child, or None after a moment."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(timeout=0.2)
    return None


def _end_family(child: subprocess.Popen[bytes]) -> None:
    """End a command and all below it: accelerate's launcher hands no signal on to the training that it started."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(child.pid).children(recursive=True)
        child.terminate()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(family, timeout=60)
