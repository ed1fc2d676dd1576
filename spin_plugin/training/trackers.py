"""Experiment trackers: one run an iteration, all in one group, continued after a kill.

Axolotl's keys say which trackers are used and transformers' callbacks send the training log to them. This names the
runs, keeps entries that a killed process has sent from being sent again, and adds what is known once the iteration is
finished.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from spin_plugin.console import warn
from spin_plugin.run.atomic import remove_atomically, write_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import COUNTS, IterationDir
from spin_plugin.training.prepare import open_pairs
from spin_plugin.training.results import COLUMNS, SEND, Results

TRACKERS = ("wandb", "mlflow", "trackio", "tensorboard", "comet")
NAME_KEYS = ("wandb_name", "mlflow_run_name", "trackio_run_name")
HAVE_TABLES = ("wandb", "trackio")
SAMPLES = 50


@dataclass
class TrackedRun:
    """What is known about an iteration's run in the trackers.

    It is stored beside the pairs, so that training on other pairs begins a new one.
    """

    file: Path
    id: str
    sent: dict[str, int] = field(default_factory=dict)
    """The last step whose log entry was sent, by the entry's first metric."""
    mlflow_id: str | None = None
    """MLflow chooses its ids itself."""
    results: dict[str, list[str]] = field(default_factory=dict)
    """The names of the finished iteration's results that each tracker has."""

    @classmethod
    def read(cls, directory: IterationDir) -> "TrackedRun | None":
        file = directory.pairs / "trackers.json"
        return cls(file, **json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def write(self) -> None:
        content = asdict(self)
        del content["file"]
        write_atomically(self.file, json.dumps(content))


class Trackers:
    """The trackers of a run."""

    def __init__(self, cfg: Any, config: Mapping[str, Any], run: RunDir) -> None:
        """
        Args:
            cfg: Axolotl's validated configuration.
            config: the user's configuration.
            run: the run directory.
        """
        self.run = run
        self.used = [name for name in TRACKERS if cfg.get(f"use_{name}")]
        self.group: str = next((config[key] for key in NAME_KEYS if config.get(key)), run.root.name)
        self.project: str = cfg.trackio_project_name or "huggingface"  # transformers' default
        self.trust_remote_code = bool(cfg.trust_remote_code)

    # --- while training ----------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Begin an iteration's run, or continue it; call it before the log is cut to the checkpoint."""
        if not self.used:
            return
        directory = self.run.iteration(number)
        tracked = TrackedRun.read(directory)
        if tracked is None:
            tracked = TrackedRun(directory.pairs / "trackers.json", token_hex(16))
            remove_atomically(directory.tensorboard)
        else:
            for entry in directory.read_log():
                kind = _kind(entry)
                tracked.sent[kind] = max(tracked.sent.get(kind, 0), int(entry["step"]))
        tracked.write()
        os.environ |= {
            "WANDB_RUN_ID": tracked.id,
            "WANDB_RESUME": "allow",
            "WANDB_RUN_GROUP": self.group,
            # Seconds that W&B keeps records in memory, which are lost in a kill; its default is 15.
            "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
            "TENSORBOARD_LOGGING_DIR": str(directory.tensorboard),
            "COMET_EXPERIMENT_KEY": tracked.id,
            "COMET_START_EXPERIMENT_TAGS": self.group,
        }
        if tracked.mlflow_id:
            os.environ["MLFLOW_RUN_ID"] = tracked.mlflow_id

    def training_arguments(self, number: int) -> dict[str, Any]:
        """Return transformers' arguments that name the run."""
        tracked = TrackedRun.read(self.run.iteration(number)) if self.used else None
        return {"run_name": self._name(number, tracked), "project": self.project} if tracked else {}

    def attach(self, trainer: Any, number: int) -> None:
        """Keep the trainer's reporting callbacks from sending what an earlier process has sent."""
        if (tracked := TrackedRun.read(self.run.iteration(number)) if self.used else None) is None:
            return
        kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
        callbacks = trainer.callback_handler.callbacks
        reporting = [callback for callback in callbacks if isinstance(callback, kinds)]
        for callback in reporting:
            callback.on_log = partial(_log_once, callback.on_log, dict(tracked.sent))
        # After those, which begin the run, and before what logs at the same event.
        callbacks.insert(callbacks.index(reporting[-1]) + 1, _Group(self.group, tracked, self.used))

    def _name(self, number: int, tracked: TrackedRun) -> str:
        """Return the run's name. Trackio continues runs by name, so there it must differ from that of a run which
        `axolotl spin reset` removed."""
        own = f"-{tracked.id[:4]}" if "trackio" in self.used else ""
        return f"{self.group}-iteration-{number}{own}"

    # --- afterwards --------------------------------------------------------------------------

    def send_results(self) -> None:
        """Send what run.json says of finished iterations and a tracker does not have yet."""
        state = self.run.read_state() if self.used else None
        for number, entry in enumerate(state.finished if state else []):
            if tracked := TrackedRun.read(self.run.iteration(number)):
                for tracker in self.used:
                    self._send(tracker, number, entry, tracked)

    def _send(self, tracker: str, number: int, entry: Mapping[str, Any], tracked: TrackedRun) -> None:
        had = tracked.results.get(tracker)
        values = {name: value for name, value in _numbers(entry) if name not in (had or ())}
        if not values:
            return
        try:
            results = Results(
                id=tracked.mlflow_id if tracker == "mlflow" else tracked.id,
                name=self._name(number, tracked),
                group=self.group,
                project=self.project,
                directory=self.run.iteration(number).tensorboard,
                values=values,
                step=int(entry["metrics"].get("step", 0)),
                samples=self._samples(number) if had is None and tracker in HAVE_TABLES else [],
            )
            SEND[tracker](results)
        except Exception as error:  # noqa: BLE001 - a client can raise anything, and the iteration is finished
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            warn(f"iteration {number}: {tracker} did not take its results; they are sent at the next start: {reason}")
        else:
            tracked.results[tracker] = [*(had or ()), *values]
            tracked.write()

    def _samples(self, number: int) -> list[list[str]]:
        """Return prompt, real and synthetic response of an iteration's first held-out pairs (or others), as text."""
        directory = self.run.iteration(number)
        pairs = open_pairs(directory)
        table = pairs.train if pairs.eval is None else pairs.eval
        own = np.flatnonzero(table.data.column("iteration").to_numpy() == number)[:SAMPLES]
        tokenizer = AutoTokenizer.from_pretrained(directory.path, trust_remote_code=self.trust_remote_code)
        return [[str(tokenizer.decode(pair[column])) for column in COLUMNS] for pair in table.select(own)]


class _Group(TrainerCallback):
    """Completes a run that transformers' callbacks have begun: its group, and the id that MLflow chose."""

    def __init__(self, group: str, tracked: TrackedRun, used: list[str]) -> None:
        self.group, self.tracked, self.used = group, tracked, used

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if "trackio" in self.used:
            import trackio

            trackio.config["_Group"] = self.group  # transformers cannot pass it on
        if "mlflow" in self.used:
            import mlflow

            mlflow.set_tag("group", self.group)
            self.tracked.mlflow_id = mlflow.active_run().info.run_id
            self.tracked.write()


def _log_once(
    log: Callable[..., None],
    sent: Mapping[str, int],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    **kwargs: Any,
) -> None:
    """Pass a log entry on unless it was sent before: after a kill, steps since the last checkpoint are repeated."""
    if state.global_step > sent.get(_kind(kwargs["logs"]), -1):
        log(args, state, control, **kwargs)


def _kind(entry: Mapping[str, Any]) -> str:
    """Return the first metric of a log entry, which tells a training step from an evaluation at the same step."""
    return next((name for name in entry if name not in ("step", "epoch", *COUNTS)), "")


def _numbers(entry: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, float]]:
    """Yield all numbers of an iteration's entry in run.json, as `held_out/mean`, except those sent while training."""
    for key, value in entry.items():
        if parent + key in ("iteration", "metrics"):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{parent}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield parent + key, float(value)
