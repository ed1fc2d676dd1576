"""What an iteration asks of its opponent: requests, sampling, and the manifest that tells two jobs apart."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from spin_plugin.config.plain import without_secrets

SHARD = 256  # requests in a shard: what can be lost at most when a run is killed
# vLLM says of so many responses how likely their tokens are (agreement.py). Where one of a batch is scored all of it
# is, which costs 17 to 34%: so they are the first ones and not spread over the job.
SCORED = 256


# What responses depend on, and how it is called before the user.
DECISIVE = {
    "iteration": "the iteration",
    "weights": "the opponent's weights",
    "sampling": "the sampling (temperature, top_p, end tokens)",
    "requests": "the number of responses",
    "requests_sha256": "the requests (prompts, seeds, lengths)",
}


def shards_of(requests: int) -> int:
    """How many shards hold so many requests."""
    return -(-requests // SHARD)


class Request(NamedTuple):
    """One synthetic response to draw."""

    number: int
    """Position in the job; shards are runs of numbers."""
    split: str
    """`train` or `eval`."""
    example: int
    """Id of the prompt in `real/`."""
    prompt: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Job:
    """A generation job without its requests: a job with another fingerprint has other responses."""

    iteration: int
    engine: dict[str, Any]
    """Arguments of `vllm.LLM`: the opponent's directory and how it is loaded."""
    adapter: str | None
    """The opponent's adapter, where it is base model plus adapter."""
    weights: str
    """Fingerprint of the opponent's weights."""
    sampling: dict[str, Any]
    """Arguments of every `vllm.SamplingParams` but max_tokens and seed."""
    requests: int
    """How many responses are asked for."""
    requests_sha256: str
    """Fingerprint of all requests."""
    revision: str | None = None
    """Commit of a base model on the hub; None of a local one."""

    def manifest(self) -> dict[str, Any]:
        """What is stored in job.json."""
        return asdict(self) | {"engine": without_secrets(self.engine)}

    def differs_from(self, manifest: Mapping[str, Any]) -> list[str]:
        """By what the responses drawn under a stored manifest are not those of this job, in words; empty: they are.

        How vLLM is run (memory, devices, paths) is free; weights, requests and sampling are not.
        """
        now = json.loads(json.dumps(self.manifest()))
        return [words for key, words in DECISIVE.items() if manifest.get(key) != now[key]]


def request_seed(seed: int, iteration: int, split: str, example: int, sample: int) -> int:
    """A seed of its own for every response, so that a shard does not depend on the others."""
    key = f"{seed}/{iteration}/{split}/{example}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big")


class Prompts(NamedTuple):
    """The prompts of one split that an iteration plays."""

    split: str
    examples: Any
    """The split's `datasets.Dataset` of examples."""
    ids: np.ndarray
    """Which of them are played."""


def requests_for(
    prompts: list[Prompts],
    *,
    iteration: int,
    seed: int,
    samples: int,
    sequence_len: int,
    max_tokens: int | None,
    block: int = 1024,
) -> Iterator[Request]:
    """Every request of an iteration, numbered, a block of prompts in memory at a time."""
    number = 0
    for split, examples, ids in prompts:
        rows = examples.select_columns(["prompt"]).with_format("arrow")
        for start in range(0, len(ids), block):
            chosen = ids[start : start + block].tolist()
            for example, prompt in zip(chosen, rows[chosen]["prompt"].to_pylist(), strict=True):
                room = sequence_len - len(prompt)
                if room < 1:  # vllm.max_model_len may be shorter than sequence_len
                    continue
                budget = room if max_tokens is None else min(room, max_tokens)
                for sample in range(samples):
                    drawn = request_seed(seed, iteration, split, example, sample)
                    yield Request(number, split, example, prompt, budget, drawn)
                    number += 1


def scored(requests: Iterable[Request]) -> Iterator[tuple[Request, bool]]:
    """Each request, and whether its response is scored: the first ones that can become pairs to train on."""
    left = SCORED
    for request in requests:
        train = request.split == "train"
        yield request, train and left > 0
        left -= train


def fingerprint_requests(requests: Iterator[Request]) -> tuple[int, str]:
    """Number of requests and a digest of all of them."""
    digest, count = hashlib.sha256(), 0
    for request in requests:
        digest.update(json.dumps(request).encode())
        count += 1
    return count, digest.hexdigest()
