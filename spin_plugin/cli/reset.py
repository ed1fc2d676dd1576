"""`axolotl spin reset`: take iterations back."""

from pathlib import Path

import click

from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import SpinError, exit_in_one_line, say


@click.command()
@CONFIG
@click.option("--iteration", type=click.IntRange(min=0), required=True, help="The first iteration to forget.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@exit_in_one_line
def reset(config: Path, iteration: int, yes: bool) -> None:
    """Remove an iteration, and all after it, from the run that CONFIG describes."""
    _, run = read_config(config)
    directories = [str(run.iteration(number).path) for number in run.started() if number >= iteration]
    if not directories and run.finished() <= iteration:
        raise SpinError(f"--iteration {iteration}: there is nothing of it in {run.root}")
    with run.locked():
        if not yes:
            click.confirm(f"remove {', '.join(directories)} with everything in it?", abort=True)
        run.reset(iteration)
    say(f"iteration {iteration} and all after it are removed; `axolotl train {config}` plays it anew")
