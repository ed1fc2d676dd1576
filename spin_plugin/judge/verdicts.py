"""Verdicts on disk: a file per shard of responses, beside it, written atomically and with a checksum.

synthetic/verdicts-00000.json   {"shard": …, "judge": …, "timeout": …, "scores": […], "sha256": digest of the others}
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_plugin.generation.shards import Shards
from spin_plugin.run.atomic import write_atomically

Scores = list[float | None]
"""A score in 0…1 for each response, in the order of the shard; None if it was passed over."""


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one judge on the responses of one iteration."""

    shards: Shards
    judge: str
    """Digest of the judge: its function, arguments and source."""
    timeout: float
    """The judge's time limit in seconds."""

    def file(self, number: int) -> Path:
        """Return the file with the verdicts on a shard."""
        return self.shards.directory / f"verdicts-{number:05d}.json"

    def read(self, number: int) -> Scores | None:
        """Return the scores of a shard; None if they are missing, damaged, of another judge or other responses.

        Responses that were passed over under a shorter time limit are judged again.
        """
        try:
            content = json.loads(self.file(number).read_text(encoding="utf-8"))
            stored = content.pop("sha256")
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None
        key = {"shard": self._digest_of_shard(number), "judge": self.judge}
        if stored != _digest(content) or any(content.get(name) != value for name, value in key.items()):
            return None
        scores: Scores = content["scores"]
        return None if None in scores and content["timeout"] < self.timeout else scores

    def write(self, number: int, scores: Sequence[float | None]) -> None:
        """Store the scores of a shard."""
        content = {
            "shard": self._digest_of_shard(number),
            "judge": self.judge,
            "timeout": self.timeout,
            "scores": list(scores),
        }
        write_atomically(self.file(number), json.dumps(content | {"sha256": _digest(content)}) + "\n")

    def scores(self) -> Iterator[float | None]:
        """Yield the scores of all responses, in the order of `Shards.responses`, once all are stored."""
        for number in range(self.shards.count()):
            found = self.read(number)
            assert found is not None, f"{self.file(number)} vanished"
            yield from found

    def _digest_of_shard(self, number: int) -> str:
        with open(self.shards.shard(number), "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
