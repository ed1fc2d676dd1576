"""Synthetic responses on disk, in shards that are written atomically and carry a checksum.

synthetic/
  job.json              the manifest
  shard-00000.jsonl     one response per line; the last line is {"responses": n, "sha256": ...} of the others
  verdicts-00000.json   the judge's scores of a shard, if there is a judge (judge/verdicts.py)
  requests/             the requests of each unfinished shard; exists while vLLM runs
  vllm.log              vLLM's output; vllm-1.log and so on for further engines, again.log for a retry
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_plugin.console import SpinError, warn
from spin_plugin.generation.job import Job, shards_of
from spin_plugin.run.atomic import remove_atomically, set_aside, write_atomically

# For a shard of an earlier iteration; the current one generates its damaged shards again.
RESTORE = (
    "restore it from a backup, or train without it: spin.history_iterations: 0, and another spin.loss_type than t_spin"
)


@dataclass(frozen=True)
class Shards:
    """The `synthetic/` directory of one iteration."""

    directory: Path

    @property
    def manifest_file(self) -> Path:
        return self.directory / "job.json"

    @property
    def requests(self) -> Path:
        return self.directory / "requests"

    def request_file(self, number: int) -> Path:
        return self.requests / f"{number:05d}.jsonl"

    def log_of(self, engine: int, *, retry: bool = False) -> Path:
        """Return the log file of an engine."""
        return self.directory / f"{'again' if retry else 'vllm'}{f'-{engine}' if engine else ''}.log"

    def logs(self) -> list[Path]:
        return sorted(self.directory.glob("*.log"))

    def shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.jsonl"

    def manifest(self) -> dict[str, Any] | None:
        """Return the stored manifest; None if it is missing or unreadable."""
        try:
            content = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def prepare(self, job: Job) -> None:
        """Keep the shards of this job; set aside those of another job."""
        manifest = self.manifest()
        if manifest is not None and not (differing := job.differs_from(manifest)):
            return
        if count := len(list(self.directory.glob("shard-*"))):
            reason = "job.json is missing or damaged"
            if manifest is not None:
                reason = f"this changed: {', '.join(differing)}{_new_revision(manifest, job)}"
            aside = set_aside(self.directory)
            warn(
                f"iteration {job.iteration}: generating {count} shards of responses again because {reason}; "
                f"the old ones were set aside in {aside}, which you can delete"
            )
        remove_atomically(self.directory)
        self.directory.mkdir(parents=True)
        write_atomically(self.manifest_file, json.dumps(job.manifest(), indent=2) + "\n")

    def update_manifest(self, **fields: Any) -> None:
        """Add fields to the manifest, such as vLLM's version."""
        write_atomically(self.manifest_file, json.dumps((self.manifest() or {}) | fields, indent=2) + "\n")

    def write(self, number: int, responses: Iterable[dict[str, Any]]) -> None:
        """Write one shard atomically."""
        lines = [json.dumps(response) for response in responses]
        write_atomically(self.shard(number), "\n".join([*lines, _seal(lines)]) + "\n")

    def read(self, number: int) -> list[dict[str, Any]]:
        """Return the responses of one shard; raises what `lines` raises."""
        return [json.loads(line) for line in self.lines(number)]

    def lines(self, number: int) -> list[str]:
        """Return the responses of one shard as JSON, which takes much longer to parse than to read.

        Raises:
            SpinError: the shard is missing, truncated or altered.
        """
        path = self.shard(number)
        try:
            *lines, seal = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise SpinError(f"{path} is missing; {RESTORE}") from None
        except (ValueError, UnicodeDecodeError):
            raise SpinError(f"{path} is damaged; {RESTORE}") from None
        if seal != _seal(lines):
            raise SpinError(f"{path} is damaged (its checksum does not match); {RESTORE}")
        return lines

    def missing(self, job: Job) -> list[int]:
        """Return the numbers of missing and damaged shards; deletes the damaged ones."""
        numbers = []
        for number in range(shards_of(job.requests)):
            try:
                self.read(number)
            except SpinError:
                self.shard(number).unlink(missing_ok=True)
                numbers.append(number)
        return numbers

    def count(self) -> int:
        """Return the number of shards of a complete job.

        Raises:
            SpinError: the manifest is missing or damaged.
        """
        manifest = self.manifest()
        if manifest is None:
            raise SpinError(
                f"{self.manifest_file} is missing or damaged, but its responses are used for training; {RESTORE}"
            )
        return shards_of(manifest["requests"])

    def responses(self) -> Iterator[dict[str, Any]]:
        """Yield all responses, ordered by request number.

        Raises:
            SpinError: the manifest or a shard is missing or damaged.
        """
        for number in range(self.count()):
            yield from self.read(number)


def _new_revision(manifest: dict[str, Any], job: Job) -> str:
    """Describe a new commit of a base model on the hub; empty if there is none."""
    before, now = manifest.get("revision"), job.revision
    return f" (on the hub from commit {before[:10]} to {now[:10]})" if before and now and before != now else ""


def _seal(lines: list[str]) -> str:
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return json.dumps({"responses": len(lines), "sha256": digest})
