"""Whether a run directory belongs to a configuration."""

from collections.abc import Mapping
from typing import Any

from spin_plugin.config.identity import differing_keys
from spin_plugin.console import SpinError
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState


def require_own(run: RunDir, config: Mapping[str, Any], iteration: int) -> RunState | None:
    """Refuse a run directory that holds something else than the run of this configuration; changes nothing.

    Args:
        run: the run directory.
        config: the user's configuration, without secrets.
        iteration: the next iteration, as it was when the configuration was lowered.

    Returns:
        The run's state; None if it has not begun.

    Raises:
        SpinError: it belongs to another configuration, or holds a model.
    """
    state = run.read_state()
    if state is None:
        if any(run.root.glob("*.safetensors")) or (run.root / "config.json").exists():
            raise SpinError(f"output_dir: {run.root} holds a model but no SPIN run; use another output_dir")
        return None
    if len(state.finished) != iteration:
        raise SpinError(f"iteration {iteration} was finished by another process; rerun the same command")
    begun = len(state.finished) + run.iteration(iteration).path.exists()
    keys = differing_keys(state.config, config, begun)
    if keys and (state.finished or run.holds_responses()):
        raise SpinError(
            f"output_dir: {run.root} belongs to a run with another configuration (these keys differ: "
            f"{', '.join(keys)}); use another output_dir, restore the keys to finish that run, or remove it with "
            "`axolotl spin reset CONFIG --iteration 0`"
        )
    return state
