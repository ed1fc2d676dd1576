"""`axolotl spin export`: write an iteration's model, ready to serve."""

from pathlib import Path

import click

from spin_plugin.args import StopArgs
from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import SpinError, exit_on_error, say
from spin_plugin.export.model import export as export_model
from spin_plugin.run.state import RunState, has_model
from spin_plugin.run.stop import find_best


@click.command()
@CONFIG
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--iteration", metavar="best|last|N", default="best", show_default=True, help="Which iteration to write.")
@click.option("--merge", "merged", is_flag=True, help="Merge an adapter into its base model.")
@exit_on_error
def export(config: Path, directory: Path, iteration: str, merged: bool) -> None:
    """Write the model of a finished iteration of CONFIG to DIRECTORY: weights, tokenizer and a model card.

    What is best is decided by `spin.stop.metric`, as `axolotl spin status` shows it.
    """
    args, run = read_config(config)
    state = run.read_state()
    if state is None or not state.finished:
        raise SpinError(f"{run.root}: no iteration is finished yet; run `axolotl spin train {config}`")
    number, chosen = _chosen(state, args.stop, iteration)
    if not has_model(state.finished[number]):
        left = [str(place) for place, entry in enumerate(state.finished) if has_model(entry)]
        raise SpinError(
            f"--iteration {iteration}: `spin.keep` has removed the model of iteration {number}; use --iteration "
            f"{' or '.join(left)}"
        )
    export_model(run, state, number, directory, merged=merged)
    say(f"wrote {chosen} to {directory}")


def _chosen(state: RunState, stop: StopArgs, wanted: str) -> tuple[int, str]:
    """Return the iteration to write, and its description.

    Raises:
        SpinError: there is no such iteration.
    """
    last = len(state.finished) - 1
    if wanted == "best":
        if best := find_best(state.finished, stop):
            return best.iteration, f"the best, {best},"
        raise SpinError("--iteration best: no iteration was measured; use --iteration last")
    number = last if wanted == "last" else int(wanted) if wanted.isdecimal() else -1
    if not 0 <= number <= last:
        raise SpinError(f"--iteration {wanted}: use best, last or 0…{last}; these iterations are finished")
    return number, f"iteration {number}"
