"""The run directory: what lies where.

output_dir/
  run.json              configuration and finished iterations; written last, read first
  weights.json          digests of the weights that were read
  real/                 prompts and real responses, tokenised once for the whole run
  iteration-0/          model or adapter, tokenizer, checkpoints, and
    config.yml          the configuration as it was resolved for this iteration
    synthetic/          the opponent's responses: job.json and shards with their checksums
    pairs/              the pairs, their statistics, and the opponent's log-probabilities
    metrics.jsonl       what training logged
    .replaced-*         responses and the last checkpoint that were set aside: something they came from has changed
  iteration-1/ ...
  config.json, model.safetensors, tokenizer.json, ...   links to the newest finished iteration
"""

import json
import os
import shutil
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spin_plugin.console import SpinError
from spin_plugin.run.atomic import REPLACED, TRASH, remove_atomically, set_aside
from spin_plugin.run.lock import locked
from spin_plugin.run.state import RunState, read_state, write_state


@dataclass(frozen=True)
class IterationDir:
    """Names inside `iteration-t`."""

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

    def opponent(self, weights: str) -> Path:
        """The opponent of this fingerprint with its adapter merged into it, there while vLLM, which cannot serve the
        adapter, draws from it."""
        return self.path / f"opponent-{weights[:16]}"

    @property
    def merged(self) -> Path:
        """With `adapter_chain: merge`, the model with its adapter merged into it: the base of the next iteration."""
        return self.path / "merged"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def logged(self) -> list[dict[str, float]]:
        """What training logged, oldest first; a line that was cut off when training was killed is left out."""
        if not self.metrics.exists():
            return []
        entries = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return entries

    def set_checkpoints_aside(self) -> Path | None:
        """Keep the newest checkpoint under a name that training does not look for; older ones go.

        Returns:
            where it lies now; None where there is none.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        for replaced in (*checkpoints[:-1], *self.path.glob(f"{REPLACED}checkpoint-*")):
            remove_atomically(replaced)
        return set_aside(checkpoints[-1])

    def last_metrics(self) -> dict[str, float]:
        """The newest value of everything that training logged, that of `spin/…` as its mean over the last epoch.

        Empty before the first log. A log holds means over `pairs` pairs.
        """
        entries = self.logged()
        merged = dict(ChainMap(*reversed(entries)))
        trained = [entry for entry in entries if "pairs" in entry]
        last_epoch = [entry for entry in trained if entry["epoch"] > trained[-1]["epoch"] - 1]
        if pairs := sum(entry["pairs"] for entry in last_epoch):
            for name in filter(lambda name: name.startswith("spin/"), merged):
                merged[name] = sum(entry[name] * entry["pairs"] for entry in last_epoch) / pairs
        return {name: value for name, value in merged.items() if name != "pairs"}

    def checkpoints(self) -> list[Path]:
        """Axolotl's checkpoints, oldest first, complete or not."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


@dataclass(frozen=True)
class RunDir:
    """The `output_dir` of a SPIN configuration."""

    root: Path

    @property
    def state_file(self) -> Path:
        return self.root / "run.json"

    @property
    def real(self) -> Path:
        return self.root / "real"

    @property
    def weights(self) -> Path:
        """What is known of files with weights, so that none is read twice (weights.py)."""
        return self.root / "weights.json"

    @property
    def waiting(self) -> Path:
        """Where the processes of a distributed run wait for each other (processes.py)."""
        return self.root / ".waiting"

    def iteration(self, number: int) -> IterationDir:
        return IterationDir(self.root / f"iteration-{number}")

    def require_writable(self) -> None:
        """Find out before any work whether the directory can be made and written.

        Raises:
            SpinError: it cannot.
        """
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise SpinError(f"output_dir: {place} is no directory; use another one")
        if not os.access(place, os.W_OK | os.X_OK):
            raise SpinError(f"output_dir: {place} cannot be written; use another one")

    def read_state(self) -> RunState | None:
        """The run's state, None where no run was started; see `state.read_state`."""
        return read_state(self.state_file)

    def write_state(self, state: RunState) -> None:
        """Replace run.json in one step."""
        write_state(self.state_file, state)

    def holds_responses(self) -> bool:
        """Whether anything that cost GPU time lies here."""
        return any(self.root.glob("iteration-*/synthetic/shard-*"))

    def finished(self) -> int:
        """How many iterations are finished; the number of the next one."""
        state = self.read_state()
        return len(state.finished) if state else 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the directory (`lock.locked`), and remove what a kill has left in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            for left in (".prepared-*", f"{TRASH}*", f"iteration-*/{TRASH}*"):
                for trash in self.root.glob(left):
                    shutil.rmtree(trash, ignore_errors=True)
            yield

    def started(self) -> list[int]:
        """Numbers of the iterations that have a directory, ascending."""
        names = (path.name.partition("-")[2] for path in self.root.glob("iteration-*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def reset(self, number: int) -> None:
        """Forget iteration `number` and all after it; run.json first, so that the run goes on wherever this is killed.

        The caller holds the lock.
        """
        state = self.read_state()
        if state and len(state.finished) > number:
            state.finished = state.finished[:number]
            self.write_state(state)
        for started in reversed(self.started()):
            if started >= number:
                remove_atomically(self.iteration(started).path)
        self._unlink_newest()
        if number:
            self.link_newest(number - 1)

    def _unlink_newest(self) -> None:
        for link in self.root.iterdir():
            if link.is_symlink() and os.readlink(link).startswith("iteration-"):
                link.unlink()

    def link_newest(self, number: int) -> None:
        """Make `output_dir` itself loadable: links to the files of iteration `number`.

        `axolotl lm-eval`, `inference`, `merge-lora` and everything else that expects a model in
        `output_dir` then finds the last finished one.
        """
        source = self.iteration(number).path
        self._unlink_newest()
        for file in sorted(source.iterdir()):
            link = self.root / file.name
            if file.is_file() and _is_model_file(file.name) and not (link.exists() or link.is_symlink()):
                link.symlink_to(Path(source.name) / file.name)


def _is_model_file(name: str) -> bool:
    """Whether a file of an iteration belongs to the model or tokenizer as opposed to its making."""
    if name in ("config.yml", "metrics.jsonl", "training_args.bin", "README.md", "trainer_state.json"):
        return False
    return name.endswith((".json", ".safetensors", ".model", ".txt", ".jinja"))
