"""Start an iteration: last checks of the validated configuration, and the announcement."""

from collections.abc import Iterable
from typing import Any

from spin_plugin.config.announce import announce
from spin_plugin.config.lower import Lowered
from spin_plugin.config.refuse import refuse_other_trainers
from spin_plugin.config.specs import read_lm_eval, read_opponent, read_training
from spin_plugin.console import SpinError, say, warn
from spin_plugin.report.write import try_report
from spin_plugin.run.processes import rank
from spin_plugin.run.stop import end_if_stopped
from spin_plugin.training.evaluation import require_tasks
from spin_plugin.training.finish import complete_finished
from spin_plugin.training.iteration import Iteration
from spin_plugin.training.threads import use_all_cores
from spin_plugin.training.trackers import Trackers


def start_iteration(cfg: Any, lowered: Lowered, other_plugins: Iterable[Any], *, for_training: bool) -> Iteration:
    """Prepare the next unfinished iteration; if all are finished, say so and exit.

    Args:
        cfg: Axolotl's validated configuration.
        lowered: the user's configuration, from which `cfg` was lowered.
        other_plugins: Axolotl's plugins except this one.
        for_training: False for `axolotl preprocess`, which stops before training.

    Raises:
        SpinError: see `end_if_stopped` and `Iteration.prepare`.
        SystemExit: all iterations are finished, or the run has stopped.
    """
    first = rank() == 0
    lm_eval, trackers = read_lm_eval(cfg), Trackers(cfg, lowered.config, lowered.run)
    cfg.lm_eval_post_train = False  # Axolotl's own hook must not evaluate again

    def complete() -> None:
        """Make up for what a kill at the end has interrupted, for no iteration follows that would."""
        if first:
            with lowered.run.locked():
                complete_finished(lowered.run, lm_eval, trackers)
            try_report(lowered.run, lowered.spin)

    if lowered.all_finished:
        complete()
        if first:
            say(
                f"all {lowered.iteration} iterations are finished (spin.iterations: {lowered.spin.iterations}); the "
                f"model is in {lowered.run.root}"
            )
        raise SystemExit(0)
    refuse_other_trainers(cfg, other_plugins)
    try:
        end_if_stopped(lowered.run, lowered.spin)
    except (SpinError, SystemExit):
        complete()
        raise
    if first:
        if lm_eval:
            require_tasks(lm_eval)
        announce(lowered, read_opponent(cfg), read_training(cfg))
        state = lowered.run.read_state()
        if state and (worse := state.worse()):
            warn(f"{worse}; iteration {lowered.iteration} starts from it all the same")
    use_all_cores()
    iteration = Iteration(cfg, lowered, lm_eval, trackers)
    iteration.prepare(for_training=for_training)
    return iteration
