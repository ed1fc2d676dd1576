"""A local Ray runs a job with two actors, one of which is killed midway."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Children

from spin_plugin.generation import dispatcher
from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import SHARD, Job, Request
from spin_plugin.generation.progress import Progress
from spin_plugin.generation.shards import Shards

pytestmark = pytest.mark.slow

TOTAL = 4 * SHARD + 9
REQUESTS = [
    Request(n, "train", n, [257, *(int(digit) + 10 for digit in f"{n:04d}")], 12 + n % 20, n) for n in range(TOTAL)
]


def is_gone(process: psutil.Process) -> bool:
    """Whether it has exited, or is a zombie that init did not reap."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_one_of_two_actors_is_killed(
    llama: Path, vllm_python: Path, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed at the first answers, when its other shards are incomplete."""
    started: list[psutil.Process] = []

    class Watched(Progress):
        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            if not started:
                started.extend(children())
                first, _ = (child for child in started if "MapWorker" in " ".join(child.cmdline()))
                first.kill()

    monkeypatch.setattr(dispatcher, "Progress", Watched)
    engine = {"model": str(llama), "skip_tokenizer_init": True, "generation_config": "vllm", "dtype": "float32"}
    engine |= {"max_model_len": 64, "seed": 0, "max_num_seqs": 8}
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "stop_token_ids": [258]}
    shards = Shards(tmp_path / "synthetic")
    job = Job(0, engine, None, "weights", sampling, TOTAL, "requests")
    generate(job, shards, lambda: REQUESTS, lambda: vllm_python, engines=2, ray=True)
    assert started
    assert [response["example"] for response in shards.responses()] == list(range(TOTAL))
    deadline = time.monotonic() + 60  # Ray's processes exit once they notice that their head process has exited
    while not all(map(is_gone, started)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
