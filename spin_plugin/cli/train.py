"""`axolotl spin train`: train all iterations, each in its own `axolotl train`."""

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
from spin_plugin.console import INTERRUPTED, SpinError, exit_on_error, say

# Keeps `accelerate launch` from printing a stack trace after the one-line error of the command it started.
QUIET = ("--", "--quiet")


@click.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@click.option("--iterations", type=click.IntRange(min=1), help="Number of iterations to train. Default: all remaining.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- AXOLOTL TRAIN ARGUMENTS]")
@exit_on_error
def train(config: Path, iterations: int | None, arguments: tuple[str, ...]) -> None:
    """Train the remaining iterations of CONFIG, each in its own `axolotl train`.

    After any crash, rerun the same command.

    \b
    axolotl spin train config.yml --iterations 1
    axolotl spin train config.yml -- --num_processes 8
    axolotl spin train config.yml -- --launcher torchrun -- --nproc_per_node=8
    """
    finished, total = progress(config)
    goal = min(total, finished + iterations) if iterations else total
    if finished >= total:
        say(f"{config}: all {total} iterations are finished")
    while finished < goal:
        _require_no_decline(config)
        code = _run([_axolotl(), "train", str(config), *(arguments or QUIET)])
        if code:
            raise SystemExit(code)
        before, (finished, total) = finished, progress(config)
        if finished == before:  # Axolotl exits with 0 when interrupted
            raise SpinError(f"iteration {before} was not finished; rerun the same command to continue it")


def progress(config: Path) -> tuple[int, int]:
    """Return the number of finished iterations and the total."""
    args, run = read_config(config)
    return run.finished(), args.iterations


def _require_no_decline(config: Path) -> None:
    """Refuse at once, without starting Axolotl, what `axolotl train` would refuse."""
    args, run = read_config(config)
    if state := run.read_state():
        state.require_no_decline(args.on_worse)


def _axolotl() -> str:
    """Return the path of this environment's `axolotl`, even if the environment is not activated."""
    own = Path(sys.executable).with_name("axolotl")
    found = str(own) if own.exists() else shutil.which("axolotl")
    if found is None:
        raise SpinError("axolotl: command not found; activate the environment in which it is installed")
    return found


def _run(command: list[str]) -> int:
    """Run a command and return its exit code.

    Docker and Slurm stop a job by SIGTERM, which is passed on to the command and its descendants.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `axolotl train` calls accelerate
    received: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        with subprocess.Popen(command, env=os.environ | {"PATH": path}) as child:
            try:
                while (code := _wait(child)) is None and not received:
                    pass
                if received:
                    _terminate_tree(child)
            except KeyboardInterrupt:  # the terminal has sent SIGINT to the child, too
                child.wait()
                return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, earlier)
    if received:
        return 128 + received[0]
    assert code is not None
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code of a child, or None after a timeout."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(timeout=0.2)
    return None


def _terminate_tree(child: subprocess.Popen[bytes]) -> None:
    """Terminate a command and its descendants, because accelerate's launcher does not forward signals."""
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(child.pid).children(recursive=True)
        child.terminate()
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(descendants, timeout=60)
