"""Real vLLM engines that share a job give the same responses as one, even when an engine is killed midway."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Children

from spin_plugin.console import SpinError
from spin_plugin.generation import dispatcher
from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import SHARD, Job, Request
from spin_plugin.generation.progress import Progress
from spin_plugin.generation.shards import Shards

pytestmark = pytest.mark.slow

TOTAL = 3 * SHARD + 9
# No prompt is a prefix of another; lengths differ.
REQUESTS = [
    Request(n, "train", n, [257, *(int(digit) + 10 for digit in f"{n:04d}"), *[20] * (n % 7)], 12 + n % 20, seed=n)
    for n in range(TOTAL)
]
Generate = Callable[..., Shards]
Event = Callable[[], None]


def answers(shards: Shards) -> list[dict[str, Any]]:
    """Return the responses without log-probs, whose last bits depend on the rest of an engine's batch."""
    return [{key: value for key, value in answer.items() if key != "logps"} for answer in shards.responses()]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Event], None]:
    """Call `event` once when an engine is ready (`start`) or at the first answer (`advance`). The dispatcher waits for
    it, so it cannot be late."""

    def install(moment: str, event: Event) -> None:
        class Watched(Progress):
            def start(self) -> None:
                super().start()
                if moment == "start":
                    event()

            def advance(self, tokens: int) -> None:
                super().advance(tokens)
                if moment == "advance" and self.done == 1:
                    event()

        monkeypatch.setattr(dispatcher, "Progress", Watched)

    return install


@pytest.fixture(scope="module")
def generate_with(llama: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Generate:
    """Run the job in a new directory with `engines` engines, with vLLM's default memory settings."""

    def run(engines: int, **arguments: Any) -> Shards:
        engine = {"model": str(llama), "skip_tokenizer_init": True, "generation_config": "vllm", "dtype": "float32"}
        engine |= {"max_model_len": 64, "seed": 0, "max_num_seqs": 8, **arguments}
        sampling = {"temperature": 1.0, "top_p": 1.0, "stop_token_ids": [258]}
        shards = Shards(tmp_path_factory.mktemp("job") / "synthetic")
        job = Job(0, engine, None, "weights", sampling, TOTAL, "requests")
        generate(job, shards, lambda: REQUESTS, lambda: vllm_python, engines=engines)
        return shards

    return run


@pytest.fixture(scope="module")
def alone(generate_with: Generate) -> list[dict[str, Any]]:
    """The responses of one engine."""
    responses = answers(generate_with(1))
    assert [response["example"] for response in responses] == list(range(TOTAL))
    return responses


@pytest.fixture(autouse=True)
def no_process_is_left(children: Children) -> Iterator[None]:
    yield
    assert not children()


def test_two_engines_share_a_job(
    generate_with: Generate, on: Callable[[str, Event], None], alone: list[dict[str, Any]], children: Children
) -> None:
    """Each has its own cores, and none listens on a port that other machines can reach."""
    seen: dict[str, Any] = {}

    def look() -> None:
        workers = children()
        seen["cores"] = [set(worker.cpu_affinity()) for worker in workers]
        seen["ports"] = [c.laddr for worker in workers for c in worker.net_connections() if c.status == "LISTEN"]

    on("advance", look)
    assert answers(generate_with(2)) == alone
    first, second = seen["cores"]
    assert os.cpu_count() == 1 or not first & second
    # gloo opens a port for each process group, even with one member
    assert {address.ip for address in seen["ports"]} <= {"127.0.0.1", "::1"}


def test_one_of_two_engines_is_killed_midway(
    generate_with: Generate,
    on: Callable[[str, Event], None],
    alone: list[dict[str, Any]],
    children: Children,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on("advance", lambda: os.killpg(children()[0].pid, signal.SIGKILL))
    assert answers(generate_with(2)) == alone
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "killed by signal 9" in warning


def kill_engine_process(children: Children) -> None:
    (engine,) = [child for child in children() if "EngineCore" in " ".join(child.cmdline())]
    engine.kill()


def test_engine_process_is_killed_once(
    generate_with: Generate,
    on: Callable[[str, Event], None],
    alone: list[dict[str, Any]],
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the engine in its own process, as on GPUs, vLLM 0.32 itself would hang. Our worker is restarted with less
    memory."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    on("advance", lambda: kill_engine_process(children))
    assert answers(generate_with(1)) == alone
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "engine process died" in warning
    assert "once more with less memory" in warning


def test_engine_process_is_killed_twice(
    generate_with: Generate, on: Callable[[str, Event], None], children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    on("start", lambda: kill_engine_process(children))
    with pytest.raises(SpinError, match="engine process died"):
        generate_with(1)
