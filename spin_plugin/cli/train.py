"""`axolotl spin train`: train all iterations, each in its own `axolotl train`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click
import psutil

from spin_plugin.cli.config_file import CONFIG, read_config, read_yaml
from spin_plugin.cli.screen import Screen
from spin_plugin.console import INTERRUPTED, SpinError, exit_on_error, say
from spin_plugin.run.directory import RunDir
from spin_plugin.run.lock import ALL_ITERATIONS, locked
from spin_plugin.run.stop import Stop, end_if_stopped, read_stop

TERMINATED = 128 + signal.SIGTERM
# Keeps `accelerate launch` from printing a stack trace after the one-line error of the command it started.
QUIET = ("--", "--quiet")


@click.command(context_settings={"ignore_unknown_options": True})
@CONFIG
@click.option("--iterations", type=click.IntRange(min=1), help="Number of iterations to train. Default: all remaining.")
@click.option("--verbose", "-v", is_flag=True, help="Show all output of `axolotl train`, not only this plugin's lines.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- AXOLOTL TRAIN ARGUMENTS]")
@exit_on_error
def train(config: Path, iterations: int | None, verbose: bool, arguments: tuple[str, ...]) -> None:
    """Train the remaining iterations of CONFIG, each in its own `axolotl train`.

    All output of `axolotl train` goes to a file in `logs` of output_dir. After any crash, rerun the same command.

    \b
    axolotl spin train config.yml --iterations 1
    axolotl spin train config.yml -- --num_processes 8
    axolotl spin train config.yml -- --launcher torchrun -- --nproc_per_node=8
    """
    _, run = read_config(config)
    finished, total = progress(config)
    goal = min(total, finished + iterations) if iterations else total
    stopped = None
    if finished < total:
        run.require_writable()
        run.root.mkdir(parents=True, exist_ok=True)
        with locked(run.root, ALL_ITERATIONS):
            stopped = _train_until(goal, config, run, arguments, verbose=verbose)
    elif _lacks_scores(config):
        _axolotl_train(config, run, total - 1, arguments, verbose=verbose)
    else:
        say(f"{config}: all {total} iterations are finished")
    _name_report(run)
    if stopped and stopped.failed:  # otherwise `axolotl train` has said why
        raise SpinError(stopped.message)


def _train_until(goal: int, config: Path, run: RunDir, arguments: tuple[str, ...], *, verbose: bool) -> Stop | None:
    """Train iterations until `goal` are finished, or the run stops; returns why it stopped."""
    if not verbose:
        say(f"all output is in {run.root / 'logs'}, a file for each iteration")
    while (finished := progress(config)[0]) < goal:
        if not _lacks_scores(config):  # else `axolotl train` makes up for them first
            end_if_stopped(run, read_config(config)[0])
        _axolotl_train(config, run, finished, arguments, verbose=verbose)
        if stopped := read_stop(run, read_config(config)[0]):
            return stopped
        if progress(config)[0] == finished:  # Axolotl exits with 0 when interrupted
            raise SpinError(f"iteration {finished} was not finished; rerun the same command to continue it")
    return None


def _name_report(run: RunDir) -> None:
    if run.report.exists():
        say(f"what self-play did: {run.report}")


def _axolotl_train(config: Path, run: RunDir, iteration: int, arguments: tuple[str, ...], *, verbose: bool) -> None:
    """Run `axolotl train` once.

    Raises:
        SystemExit: it exited with another code than 0.
    """
    command = [_axolotl(), "train", str(config), *(arguments or QUIET)]
    with (None if verbose else _screen(run, iteration)) or nullcontext() as screen:
        code = _run(command, screen)
    failed = code not in (0, INTERRUPTED, TERMINATED)
    if screen and failed:
        screen.explain()
    if failed and run.iteration(iteration).metrics.exists():  # it failed in training
        from spin_plugin.report.write import try_report

        try_report(run, read_config(config)[0])  # here, where no other rank waits for it
    if code:
        _name_report(run)
        raise SystemExit(code)


def _lacks_scores(config: Path) -> bool:
    """Whether a kill has interrupted the evaluation of an iteration, for which `axolotl train` makes up."""
    cfg, (_, run) = read_yaml(config), read_config(config)
    used = any(str(name).endswith("LMEvalPlugin") for name in cfg.get("plugins") or [])
    return bool(used and cfg.get("lm_eval_tasks") and cfg.get("lm_eval_post_train", True) and run.unevaluated())


def progress(config: Path) -> tuple[int, int]:
    """Return the number of finished iterations and the total."""
    args, run = read_config(config)
    return run.finished(), args.iterations


def _axolotl() -> str:
    """Return the path of this environment's `axolotl`, even if the environment is not activated."""
    own = Path(sys.executable).with_name("axolotl")
    found = str(own) if own.exists() else shutil.which("axolotl")
    if found is None:
        raise SpinError("axolotl: command not found; activate the environment in which it is installed")
    return found


def _run(command: list[str], screen: Screen | None) -> int:
    """Run a command and return its exit code.

    Docker and Slurm stop a job by SIGTERM, which is passed on to the command and its descendants.

    Args:
        screen: shows the command's output; None: the command does.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `axolotl train` calls accelerate
    written: dict[str, Any] = {"stdout": screen.output, "stderr": subprocess.STDOUT} if screen else {}
    received: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        with subprocess.Popen(command, env=os.environ | {"PATH": path}, **written) as child:
            try:
                while (code := _wait(child)) is None and not received:
                    if screen:
                        screen.update()
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


def _screen(run: RunDir, iteration: int) -> Screen | None:
    """Return the screen for an iteration; None if no log can be written, of which `axolotl train` says the reason."""
    with suppress(OSError):
        log = run.root / "logs" / f"iteration-{iteration}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        return Screen(log, f"iteration {iteration}: axolotl train is starting")
    return None


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
