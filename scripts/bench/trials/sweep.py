"""Sweeps: train with several learning rates and lengths, and let the dev split choose among all checkpoints."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from trials.task import Scores, Sweep, Task
from trials.unit import Found, checkpoints, train


def percent(scores: Scores) -> dict[str, float]:
    """Return the means in percent."""
    return {name: round(100 * fmean(values), 4) for name, values in scores.items()}


def affordable(epoch: int, before: int, limit: float) -> list[int]:
    """Return the number of epochs that the limit of compute allows, and a sixth of it; at least 1."""
    return sorted({max(1, int((limit - before) / epoch / part)) for part in (6, 1)})


def candidates(
    task: Task,
    directory: Path,
    sweep: Sweep,
    config: Found,
    *,
    epoch: int = 0,
    before: int = 0,
    limit: float = math.inf,
) -> Iterator[Found]:
    """Train all runs of a sweep; yields each checkpoint that `limit` allows, with its scores on the dev split.

    Args:
        task: scores the checkpoints.
        directory: holds the runs.
        sweep: the runs.
        config: their configuration, without learning rate and length.
        epoch: compute of an epoch.
        before: compute before the first epoch.
        limit: largest compute of a checkpoint.
    """
    for rate in sweep.learning_rates:
        for epochs in sweep.epochs or affordable(epoch, before, limit):
            own = {
                "learning_rate": rate,
                "num_epochs": epochs,
                "save_strategy": "steps",
                "save_steps": 1 / sweep.checkpoints,
                "save_only_model": True,
                "save_total_limit": sweep.checkpoints,
            }
            found = checkpoints(train(directory / f"{rate:g}-{epochs}", config | own))
            for step, model in found.items():
                # not `epochs` at the last step: Axolotl rounds the number of steps
                done = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))["epoch"]
                compute = round(before + done * epoch)
                if compute <= limit:
                    settings = {"learning_rate": rate, "epochs": epochs, "step": step, "compute": compute}
                    yield settings | {"dev": percent(task.score(model, "dev")), "model": str(model)}
