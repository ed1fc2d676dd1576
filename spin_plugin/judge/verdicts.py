"""Verdicts on disk: a file per shard of responses, beside it, written atomically and with a checksum.

synthetic/verdicts-00000.json   {"shard": …, "judge": …, "sources": …, "timeout": …, "scores": […],
                                 "sha256": digest of the others}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spin_plugin.generation.shards import Shards
from spin_plugin.run.atomic import write_atomically

Scores = list[float | None]
"""A score in 0…1 for each response, in the order of the shard; None if it was skipped."""


class Verdict(NamedTuple):
    """The stored verdict on a shard."""

    scores: Scores
    sources: dict[str, str]
    """The modules that defined the judge, with digests of their files."""


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one judge on the responses of one iteration."""

    shards: Shards
    judge: str
    """Digest of the judge's function and arguments."""
    timeout: float
    """The judge's time limit in seconds."""

    def file(self, number: int) -> Path:
        """Return the file with the verdicts on a shard."""
        return self.shards.directory / f"verdicts-{number:05d}.json"

    def read(self, number: int) -> Verdict | None:
        """Return the verdict on a shard; None if it is missing, damaged, of another judge or other responses.

        Responses that were skipped under a shorter time limit are judged again. If the shard itself is missing, its
        verdict still counts.
        """
        try:
            content = json.loads(self.file(number).read_text(encoding="utf-8"))
            stored = content.pop("sha256")
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None
        if stored != _digest(content) or content["judge"] != self.judge:
            return None
        if self.shards.shard(number).exists() and content["shard"] != self._digest_of_shard(number):
            return None
        scores: Scores = content["scores"]
        return None if None in scores and content["timeout"] < self.timeout else Verdict(scores, content["sources"])

    def write(self, number: int, scores: Sequence[float | None], sources: Mapping[str, str]) -> None:
        """Store the scores of a shard, by a judge that these modules define."""
        content = {
            "shard": self._digest_of_shard(number),
            "judge": self.judge,
            "sources": dict(sources),
            "timeout": self.timeout,
            "scores": list(scores),
        }
        write_atomically(self.file(number), json.dumps(content | {"sha256": _digest(content)}) + "\n")

    def _digest_of_shard(self, number: int) -> str:
        with open(self.shards.shard(number), "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
