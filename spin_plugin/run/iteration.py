"""The directory of one iteration; directory.py shows the whole layout."""

import json
from collections import ChainMap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_plugin.run.atomic import REPLACED, remove_atomically, set_aside

COUNTS = ("pairs", "tokens", "seconds")
"""What an entry of the training log counts beside its metrics."""


@dataclass(frozen=True)
class IterationDir:
    """Paths inside `iteration-t`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yml"

    @property
    def synthetic(self) -> Path:
        return self.path / "synthetic"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs"

    def rewards(self, split: str) -> Path:
        """Rewards of each pair (`opponent.store.RewardStore`): training pairs as last seen, held-out ones after it."""
        return self.pairs / f"rewards-{split}.safetensors"

    @property
    def measured(self) -> Path:
        """What was measured before the first step (training/measured.py)."""
        return self.pairs / "measured.json"

    def opponent(self, weights: str) -> Path:
        """The opponent with this fingerprint, its adapter merged; exists only while vLLM generates from it, for
        adapters that vLLM cannot serve."""
        return self.path / f"opponent-{weights[:16]}"

    @property
    def merged(self) -> Path:
        """With `adapter_chain: merge`, the model with its adapter merged: the next iteration's base model."""
        return self.path / "merged"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def lm_eval(self) -> Path:
        """Results of lm-evaluation-harness."""
        return self.path / "lm_eval_results"

    @property
    def lm_eval_log(self) -> Path:
        return self.path / "lm_eval.log"

    @property
    def lm_eval_failure(self) -> Path:
        """The log of an evaluation that failed."""
        return self.path / "lm_eval-failed.log"

    def read_log(self) -> list[dict[str, float]]:
        """Return the training log, oldest entry first, without damaged lines, such as one truncated by a kill."""
        if not self.metrics.exists():
            return []
        entries: list[Any] = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict)]

    def set_checkpoints_aside(self) -> Path | None:
        """Move the newest checkpoint to a backup name that training ignores; delete older ones.

        Returns:
            The backup's path, or None if there is no checkpoint.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        for replaced in (*checkpoints[:-1], *self.path.glob(f"{REPLACED}checkpoint-*")):
            remove_atomically(replaced)
        return set_aside(checkpoints[-1])

    def remove_model(self) -> None:
        """Delete the weights, merged ones included; what describes them stays."""
        remove_atomically(self.merged)
        for file in (*self.weights(), *self.path.glob("*.safetensors.index.json")):
            file.unlink()

    def weights(self) -> list[Path]:
        """Return the files that hold the weights of model or adapter."""
        return list(self.path.glob("*.safetensors"))

    def last_metrics(self) -> dict[str, float]:
        """Return the newest value of every logged metric; for `spin/…`, the mean over the last epoch.

        Empty before the first log entry. Each entry contains means over `pairs` pairs; it took `seconds`, in which the
        model computed `tokens`.
        """
        entries = self.read_log()
        merged = dict(ChainMap(*reversed(entries)))
        trained = [entry for entry in entries if "pairs" in entry]
        last_epoch = [entry for entry in trained if entry["epoch"] > trained[-1]["epoch"] - 1]
        for name in {name for entry in last_epoch for name in entry if name.startswith("spin/")}:
            # entries of a version without this metric are left out
            having = [entry for entry in last_epoch if name in entry]
            merged[name] = sum(entry[name] * entry["pairs"] for entry in having) / sum(e["pairs"] for e in having)
        return {name: value for name, value in merged.items() if name not in COUNTS}

    def checkpoints(self) -> list[Path]:
        """Return Axolotl's checkpoints, oldest first, including incomplete ones."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
