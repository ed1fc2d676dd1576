"""A generation job: its requests, its sampling parameters and its manifest."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from spin_plugin.config.plain import without_secrets

SHARD = 256  # requests per shard; a killed run loses unfinished shards only
# Responses for which vLLM returns log-probs, used by the agreement check (agreement.py). One scored request makes vLLM
# score its entire batch, which costs 17 to 34%, so the first ones are scored instead of a sample of the job.
SCORED = 256

# Manifest keys that determine the responses, and their names in messages.
IDENTITY = {
    "iteration": "the iteration",
    "weights": "the opponent's weights",
    "sampling": "the sampling (temperature, top_p, end tokens)",
    "requests": "the number of responses",
    "requests_sha256": "the requests (prompts, seeds, lengths)",
}


def shards_of(requests: int) -> int:
    """Return the number of shards that hold `requests` requests."""
    return -(-requests // SHARD)


class Request(NamedTuple):
    """Request for one synthetic response."""

    number: int
    """Position in the job; a shard holds consecutive numbers."""
    split: str
    """`train` or `eval`."""
    example: int
    """Id of the prompt in `real/`."""
    prompt: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Job:
    """A generation job without its requests."""

    iteration: int
    engine: dict[str, Any]
    """Arguments of `vllm.LLM`: the opponent's model and how to load it."""
    adapter: str | None
    """The opponent's adapter, if it is a base model plus an adapter."""
    weights: str
    """Fingerprint of the opponent's weights."""
    sampling: dict[str, Any]
    """Arguments of every `vllm.SamplingParams` except max_tokens and seed."""
    requests: int
    """Number of requests."""
    requests_sha256: str
    """Fingerprint of all requests."""
    revision: str | None = None
    """Commit of a base model on the hub; None for a local model."""

    def manifest(self) -> dict[str, Any]:
        """Return the content of job.json, without secrets."""
        return asdict(self) | {"engine": without_secrets(self.engine)}

    def differs_from(self, manifest: Mapping[str, Any]) -> list[str]:
        """Describe what changed since a stored manifest; empty if its responses are valid for this job.

        Weights, requests and sampling are compared. How vLLM runs (memory, devices, paths) is not.
        """
        now = json.loads(json.dumps(self.manifest()))
        return [words for key, words in IDENTITY.items() if manifest.get(key) != now[key]]


def request_seed(seed: int, iteration: int, split: str, example: int, sample: int) -> int:
    """Return a response's own seed, which makes shards independent of one another."""
    key = f"{seed}/{iteration}/{split}/{example}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big")


class Prompts(NamedTuple):
    """The prompts of one split that an iteration uses."""

    split: str
    examples: Any
    """The split's `datasets.Dataset` of examples."""
    ids: np.ndarray
    """Ids of the examples to use."""


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
    """Yield the numbered requests of an iteration, reading `block` prompts at a time."""
    number = 0
    for split, examples, ids in prompts:
        rows = examples.select_columns(["prompt"]).with_format("arrow")
        for start in range(0, len(ids), block):
            chosen = ids[start : start + block].tolist()
            for example, prompt in zip(chosen, rows[chosen]["prompt"].to_pylist(), strict=True):
                space = sequence_len - len(prompt)
                if space < 1:  # vllm.max_model_len may be shorter than sequence_len
                    continue
                budget = space if max_tokens is None else min(space, max_tokens)
                for sample in range(samples):
                    response_seed = request_seed(seed, iteration, split, example, sample)
                    yield Request(number, split, example, prompt, budget, response_seed)
                    number += 1


def scored(requests: Iterable[Request]) -> Iterator[tuple[Request, bool]]:
    """Yield each request and whether to score it: the first `SCORED` of the training split are scored."""
    left = SCORED
    for request in requests:
        train = request.split == "train"
        yield request, train and left > 0
        left -= train


def fingerprint_requests(requests: Iterator[Request]) -> tuple[int, str]:
    """Return the number of requests and their digest."""
    digest, count = hashlib.sha256(), 0
    for request in requests:
        digest.update(json.dumps(request).encode())
        count += 1
    return count, digest.hexdigest()
