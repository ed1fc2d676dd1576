"""Adds the results of a finished iteration to its run in each experiment tracker."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("prompt", "real", "synthetic")
STEP = "train/global_step"  # the x-axis of transformers' callbacks


@dataclass(frozen=True)
class Results:
    """What a finished iteration adds to its run in a tracker."""

    id: str | None
    name: str
    group: str
    project: str
    """Trackio's."""
    directory: Path
    """TensorBoard's."""
    values: Mapping[str, float]
    step: int
    samples: list[list[str]]


def _to_wandb(results: Results) -> None:
    import wandb

    run = wandb.run
    if run is None or run.id != results.id:  # otherwise it is still there from training
        run = wandb.init(
            id=results.id, name=results.name, group=results.group, resume="allow", reinit="finish_previous"
        )
    table = {"samples": wandb.Table(columns=list(COLUMNS), data=results.samples)} if results.samples else {}
    run.log({**results.values, **table, STEP: results.step})
    run.finish()


def _to_trackio(results: Results) -> None:
    import trackio
    from pandas import DataFrame

    trackio.init(results.project, name=results.name, group=results.group, resume="allow", embed=False)
    rows = DataFrame(results.samples, columns=list(COLUMNS))
    table = {"samples": trackio.Table(dataframe=rows)} if results.samples else {}
    trackio.log({**results.values, **table, STEP: results.step})
    trackio.finish()


def _to_tensorboard(results: Results) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(results.directory) as writer:
        for name, value in results.values.items():
            writer.add_scalar(name, value, results.step)


def _to_mlflow(results: Results) -> None:
    import mlflow

    values = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in results.values.items()}
    with mlflow.start_run(run_id=results.id, run_name=results.name):
        mlflow.log_metrics(values, step=results.step)


def _to_comet(results: Results) -> None:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    if experiment is None or experiment.ended or experiment.get_key() != results.id:
        experiment = comet_ml.start(experiment_key=results.id, mode="get_or_create")
    experiment.log_metrics(dict(results.values), step=results.step)
    experiment.end()


SEND: dict[str, Callable[[Results], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
    "comet": _to_comet,
}
