"""`axolotl spin reset`: remove iterations from a run."""

from pathlib import Path

import click

from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import SpinError, exit_on_error, say


@click.command()
@CONFIG
@click.option("--iteration", type=click.IntRange(min=0), required=True, help="First iteration to remove.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@exit_on_error
def reset(config: Path, iteration: int, yes: bool) -> None:
    """Remove an iteration and all later ones from the run configured by CONFIG."""
    _, run = read_config(config)
    directories = [str(run.iteration(number).path) for number in run.started() if number >= iteration]
    if not directories and run.finished() <= iteration:
        raise SpinError(f"--iteration {iteration}: not in {run.root}; see `axolotl spin status {config}`")
    with run.locked():
        run.require_opponent_of(iteration)
        if not yes:
            click.confirm(f"remove {', '.join(directories)} and all their contents?", abort=True)
        run.reset(iteration)
    say(f"removed iteration {iteration} and all later ones; `axolotl train {config}` runs it again")
