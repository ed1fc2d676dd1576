"""The run directory and its layout.

output_dir/
  run.json              configuration and finished iterations; written last, read first
  weights.json          digests of the weight files read so far
  real/                 prompts and real responses, tokenized once per run
  iteration-0/          model or adapter, tokenizer, checkpoints, and
    config.yml          the configuration resolved for this iteration
    synthetic/          the opponent's responses: job.json and shards with checksums
    pairs/              the pairs, their statistics, the opponent's log-probs, the rewards reached, and measured.json:
                        what was measured before the first step
    metrics.jsonl       the training log
    tensorboard/        the same, and lm_eval_results/ with lm_eval.log, where configured
    .replaced-*         responses and checkpoint set aside because one of their inputs changed
  iteration-1/ ...
  report.html           what self-play did; report.json and report.jsonl hold its data
  logs/                 everything that `axolotl spin train` leaves out on the screen
  config.json, model.safetensors, tokenizer.json, ...   links to the newest finished iteration
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spin_plugin.console import SpinError
from spin_plugin.run.atomic import TRASH, remove_atomically
from spin_plugin.run.disk import nearest
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.lock import locked
from spin_plugin.run.state import CHECKPOINTS, RunState, has_model, read_state, restartable, write_state


@dataclass(frozen=True)
class RunDir:
    """The `output_dir` of a SPIN configuration."""

    root: Path

    @property
    def state_file(self) -> Path:
        return self.root / "run.json"

    @property
    def report(self) -> Path:
        """The page of `axolotl spin report`; its data is beside it as .json and .jsonl."""
        return self.root / "report.html"

    @property
    def real(self) -> Path:
        return self.root / "real"

    @property
    def weights(self) -> Path:
        """Cached digests of weight files, so that none is read twice (weights.py)."""
        return self.root / "weights.json"

    @property
    def barrier(self) -> Path:
        """Files through which the ranks of a distributed run synchronize (processes.py)."""
        return self.root / ".barrier"

    def iteration(self, number: int) -> IterationDir:
        return IterationDir(self.root / f"iteration-{number}")

    def require_writable(self) -> None:
        """Check before any work that the directory can be created and written.

        Raises:
            SpinError: it cannot.
        """
        place = nearest(self.root)
        if not place.is_dir():
            raise SpinError(f"output_dir: {place} is not a directory; use another one")
        if not os.access(place, os.W_OK | os.X_OK):
            raise SpinError(f"output_dir: {place} is not writable; use another one")

    def read_state(self) -> RunState | None:
        """Return the run's state, or None if no run was started; see `state.read_state`."""
        return read_state(self.state_file)

    def write_state(self, state: RunState) -> None:
        """Replace run.json atomically."""
        write_state(self.state_file, state)

    def holds_responses(self) -> bool:
        """Whether the directory contains synthetic responses, which cost GPU time."""
        return any(self.root.glob("iteration-*/synthetic/shard-*"))

    def finished(self) -> int:
        """Return the number of finished iterations, which is the next iteration's number."""
        state = self.read_state()
        return len(state.finished) if state else 0

    def remove_marked(self) -> None:
        """Delete what run.json marks as removed (keep.py); a kill midway leaves the rest to the next call."""
        state = self.read_state()
        for number, entry in enumerate(state.finished if state else ()):
            iteration = self.iteration(number)
            for checkpoint in iteration.checkpoints() if CHECKPOINTS in entry.get("removed", ()) else ():
                remove_atomically(checkpoint)
            if not has_model(entry):
                iteration.remove_model()

    def unevaluated(self) -> list[int]:
        """Return the finished iterations that lm-evaluation-harness has yet to score: it did not fail there."""
        state = self.read_state()
        lacking = (
            (number, self.iteration(number))
            for number, entry in enumerate(state.finished if state else [])
            if "lm_eval" not in entry and has_model(entry)
        )
        return [number for number, one in lacking if any(one.weights()) and not one.lm_eval_failure.exists()]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against other runs (`lock.locked`) and remove leftovers of a kill."""
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            for left in (".prepared-*", ".*.tmp", f"{TRASH}*", f"iteration-*/{TRASH}*", "iteration-*/.*.tmp"):
                for trash in self.root.glob(left):
                    trash.unlink() if trash.is_file() else shutil.rmtree(trash, ignore_errors=True)
            self.remove_marked()
            yield

    def started(self) -> list[int]:
        """Return the numbers of the iterations that have a directory, ascending."""
        names = (path.name.partition("-")[2] for path in self.root.glob("iteration-*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdigit())

    def require_opponent_of(self, number: int) -> None:
        """Check before a reset that the model from which iteration `number` starts is still there.

        Raises:
            SpinError: `spin.keep` has removed it.
        """
        state = self.read_state()
        finished = state.finished[:number] if state else []
        if finished and not has_model(finished[-1]):
            left = map(str, restartable(finished, number))
            raise SpinError(
                f"--iteration {number}: starts from the model of iteration {len(finished) - 1}, which `spin.keep` has "
                f"removed; use --iteration {' or '.join(left)}"
            )

    def reset(self, number: int) -> None:
        """Delete iteration `number` and all later ones; run.json first, so that the run can resume after a kill midway.

        The caller holds the lock.
        """
        state = self.read_state()
        if state and len(state.finished) > number:
            state.finished = state.finished[:number]
            self.write_state(state)
        for started in reversed(self.started()):
            if started >= number:
                remove_atomically(self.iteration(started).path)
        for shown in ("html", "json", "jsonl"):  # what is removed
            self.report.with_suffix(f".{shown}").unlink(missing_ok=True)
        self._unlink_newest()
        if number:
            self.link_newest(number - 1)

    def _unlink_newest(self) -> None:
        for link in self.root.iterdir():
            if link.is_symlink() and os.readlink(link).startswith("iteration-"):
                link.unlink()

    def link_newest(self, number: int) -> None:
        """Make `output_dir` itself loadable by linking to the files of iteration `number`.

        `axolotl lm-eval`, `inference`, `merge-lora` and other tools that expect a model in `output_dir` then find the
        last finished one.
        """
        source = self.iteration(number).path
        self._unlink_newest()
        for file in model_files(source):
            link = self.root / file.name
            if not (link.exists() or link.is_symlink()):
                link.symlink_to(Path(source.name) / file.name)


def model_files(directory: Path) -> list[Path]:
    """Return the files of a model or adapter and of its tokenizer, without those of its training."""
    endings = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")  # .py: a model's own code
    found = (file for file in sorted(directory.iterdir()) if file.is_file() and file.name.endswith(endings))
    return [file for file in found if file.name != "trainer_state.json"]
