"""run.json: a run's configuration and finished iterations; written last, read first."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError
from spin_plugin.objective.decline import decline
from spin_plugin.run.atomic import write_atomically

FORMAT = 3
# What `spin.keep` removes from past iterations: names in the list `removed` of their entries.
MODEL, CHECKPOINTS = "model", "checkpoints"


@dataclass
class RunState:
    """The contents of run.json."""

    config: dict[str, Any]
    finished: list[dict[str, Any]] = field(default_factory=list)
    version: str = ""

    def worse(self) -> str | None:
        """Say that the last finished iteration made the model worse; None if it did not or was not checked."""
        found = decline(self.finished[-1]) if self.finished else None
        return f"iteration {len(self.finished) - 1} {found}" if found else None


def has_model(entry: Mapping[str, Any]) -> bool:
    """Whether a finished iteration in run.json still has its model."""
    return MODEL not in entry.get("removed", ())


def restartable(finished: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """Return the iterations before `number` that can be trained again: the model that each starts from is still there.

    Args:
        finished: the finished iterations in run.json, in order.
        number: at most one more than there are.
    """
    return [one for one in range(number) if one == 0 or has_model(finished[one - 1])]


def read_state(file: Path) -> RunState | None:
    """Return the run's state, or None if no run was started.

    Raises:
        SpinError: run.json has another version's format or is damaged.
    """
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise SpinError(
                f"{file} was written by another version of spin-plugin ({content.get('version')}); finish the run with "
                "that version, or use another output_dir"
            )
        if not isinstance(content["config"], dict) or not isinstance(content["finished"], list):
            raise TypeError("config or finished has the wrong type")
        return RunState(content["config"], content["finished"], content["version"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise SpinError(f"{file} is damaged ({error}); restore it from a backup or use another output_dir") from None


def write_state(file: Path, state: RunState) -> None:
    """Replace run.json atomically."""
    content = {"format": FORMAT, "version": state.version, "config": state.config, "finished": state.finished}
    write_atomically(file, json.dumps(content, indent=2, default=str) + "\n")
