"""A unit of evidence, and the commands that all methods use."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from spin_plugin.run.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "scripts/bench/results/evidence"
PACKAGES = ("axolotl", "torch", "transformers", "trl")
# once, before the code can change under a running program
COMMIT = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.strip()
FINISHED = "finished"
Found = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One task, method and seed, and the file of its result."""

    task: str
    method: str
    seed: int
    results: Path = RESULTS

    @property
    def file(self) -> Path:
        return self.results / f"{self.task}-{self.method}-{self.seed}.json"

    def read(self) -> Found:
        """Return the result.

        Raises:
            FileNotFoundError: the unit has not run.
        """
        found: Found = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def write(self, found: Found) -> None:
        """Write the result, atomically: its presence means that the unit has finished."""
        head = {"task": self.task, "method": self.method, "seed": self.seed, "commit": COMMIT}
        versions = {package: version(package) for package in PACKAGES}
        self.results.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(head | {"versions": versions} | found) + "\n")


def run(command: list[Any], log: Path, says: str = "") -> None:
    """Run a command with its output appended to a log.

    Args:
        command: its words.
        log: the file.
        says: what a command that has finished has said.

    Raises:
        SystemExit: it failed; the message names the log.
    """
    variables = os.environ | {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DATASET_NUM_PROC": "0",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin made a base model take 27 minutes beside another run, not 2
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a+", encoding="utf-8", errors="replace") as file:
        begin = file.tell()
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=file, stderr=file, check=False)
        file.seek(begin)
        finished = done.returncode == 0 and says in file.read()
    if not finished:
        raise SystemExit(f"evidence: {' '.join(map(str, command))} failed, see {log}")


@contextmanager
def once(directory: Path, wanted: str) -> Iterator[bool]:
    """Yield whether something still has to be done in a directory; leaving without an error marks it as done.

    Another process or thread that wants to do it waits.

    Args:
        directory: where it is done.
        wanted: what is to be done. What was done must have been the same.

    Raises:
        SystemExit: it was not.
    """
    marker = directory / FINISHED
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        if marker.exists() and marker.read_text(encoding="utf-8") != wanted:
            raise SystemExit(f"evidence: {directory} was made with other settings; remove it")
        yield not marker.exists()
        write_atomically(marker, wanted)


def train(directory: Path, config: dict[str, Any], *command: str) -> Path:
    """Run `axolotl train`, or another command of Axolotl, unless it has finished before.

    Args:
        directory: holds configuration, log and `run`, the output directory.
        config: the configuration without `output_dir`.
        command: the words between `axolotl` and the configuration.

    Returns:
        The output directory.
    """
    output = directory / "run"
    content = yaml.safe_dump(config | {"output_dir": str(output)})
    with once(directory, content) as needed:
        if needed:
            if not command:
                shutil.rmtree(output, ignore_errors=True)  # a killed run's checkpoints; SPIN continues by itself
            (directory / "config.yml").write_text(content, encoding="utf-8")
            # interrupted, `axolotl train` saves what it has and exits with 0
            says = "" if command else "Training completed!"
            run(["axolotl", *(command or ("train",)), directory / "config.yml"], directory / "log", says)
    return output


def checkpoints(directory: Path, kind: str = "checkpoint") -> dict[int, Path]:
    """Return a run's checkpoints by the number after their kind (of Axolotl, the step), ascending."""
    return dict(sorted((int(path.name.rpartition("-")[2]), path) for path in directory.glob(f"{kind}-*")))
