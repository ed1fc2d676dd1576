"""The synthetic responses on disk: shards that are whole or absent, each with its checksum.

synthetic/
  job.json              the manifest
  shard-00000.jsonl     one response a line; the last line is {"responses": n, "sha256": ...} of the rest
  requests/             what is asked, a file for each unfinished shard; there while vLLM works
  vllm.log              what vLLM printed; of several engines vllm-1.log and so on, of a second attempt again.log
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

# The iteration that is being played draws a damaged shard anew by itself; this is about an earlier one's.
WAY_OUT = "restore it from a backup or set spin.history_iterations to 0"


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

    def log_of(self, engine: int, *, again: bool = False) -> Path:
        """What an engine printed, in the second attempt where `again`."""
        return self.directory / f"{'again' if again else 'vllm'}{f'-{engine}' if engine else ''}.log"

    def logs(self) -> list[Path]:
        return sorted(self.directory.glob("*.log"))

    def shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.jsonl"

    def manifest(self) -> dict[str, Any] | None:
        """The stored manifest; None where it is absent or unreadable."""
        try:
            content = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def prepare(self, job: Job) -> None:
        """Keep the shards of this very job; set aside what another job has left."""
        manifest = self.manifest()
        if manifest is not None and not (differing := job.differs_from(manifest)):
            return
        if count := len(list(self.directory.glob("shard-*"))):
            reason = "nobody knows what they were drawn for: job.json is missing or damaged"
            if manifest is not None:
                reason = f"they were drawn before this changed: {', '.join(differing)}{_moved(manifest, job)}"
            aside = set_aside(self.directory)
            warn(
                f"iteration {job.iteration}: the responses of {count} shards are drawn anew, as {reason}; the old ones "
                f"are kept in {aside}: remove it if you do not need it"
            )
        remove_atomically(self.directory)
        self.directory.mkdir(parents=True)
        write_atomically(self.manifest_file, json.dumps(job.manifest(), indent=2) + "\n")

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest, such as vLLM's version."""
        write_atomically(self.manifest_file, json.dumps((self.manifest() or {}) | facts, indent=2) + "\n")

    def write(self, number: int, responses: Iterable[dict[str, Any]]) -> None:
        """Write one shard in one step."""
        lines = [json.dumps(response) for response in responses]
        write_atomically(self.shard(number), "\n".join([*lines, _seal(lines)]) + "\n")

    def read(self, number: int) -> list[dict[str, Any]]:
        """The responses of one shard.

        Raises:
            SpinError: the shard is missing, truncated or altered.
        """
        path = self.shard(number)
        try:
            *lines, seal = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise SpinError(
                f"{path} is missing; restore it, or set spin.history_iterations to 0 if it is an earlier iteration's"
            ) from None
        except (ValueError, UnicodeDecodeError):
            raise SpinError(f"{path} is damaged; {WAY_OUT}") from None
        if seal != _seal(lines):
            raise SpinError(f"{path} is damaged (its checksum does not fit); {WAY_OUT}")
        return [json.loads(line) for line in lines]

    def missing(self, job: Job) -> list[int]:
        """Numbers of the shards that are absent or damaged; a damaged one is removed."""
        absent = []
        for number in range(shards_of(job.requests)):
            try:
                self.read(number)
            except SpinError:
                self.shard(number).unlink(missing_ok=True)
                absent.append(number)
        return absent

    def responses(self) -> Iterator[dict[str, Any]]:
        """All responses in the order of the requests.

        Raises:
            SpinError: the directory, or one of its shards, is missing or damaged.
        """
        manifest = self.manifest()
        if manifest is None:
            raise SpinError(
                f"{self.directory} is missing though its responses are mixed in; restore it or set "
                "spin.history_iterations to 0"
            )
        for number in range(shards_of(manifest["requests"])):
            yield from self.read(number)


def _moved(manifest: dict[str, Any], job: Job) -> str:
    """What to add where a base model has moved on the hub."""
    before, now = manifest.get("revision"), job.revision
    return f" (on the hub from commit {before[:10]} to {now[:10]})" if before and now and before != now else ""


def _seal(lines: list[str]) -> str:
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return json.dumps({"responses": len(lines), "sha256": digest})
