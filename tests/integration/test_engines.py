"""Real vLLM engines that share a job: the same responses as from one, also when an engine dies in the middle."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Family

from spin_plugin.console import SpinError
from spin_plugin.generation import dispatcher
from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import SHARD, Job, Request
from spin_plugin.generation.progress import Progress
from spin_plugin.generation.shards import Shards

pytestmark = pytest.mark.slow

TOTAL = 3 * SHARD + 9
# No text of one prompt is a beginning of another's; lengths differ.
REQUESTS = [
    Request(n, "train", n, [257, *(int(digit) + 10 for digit in f"{n:04d}"), *[20] * (n % 7)], 12 + n % 20, seed=n)
    for n in range(TOTAL)
]
Draw = Callable[..., Shards]
Event = Callable[[], None]


def answers(shards: Shards) -> list[dict[str, Any]]:
    """The responses; their log-probabilities depend in the last bits on what else an engine works on."""
    return [{key: value for key, value in answer.items() if key != "logps"} for answer in shards.responses()]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Event], None]:
    """Do something once when an engine is ready (`start`), or with the first answer (`advance`). The launcher waits
    for it, so it cannot come too late."""

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
def draw(llama: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Play the job in a fresh directory with so many engines. No option says how much memory to take."""

    def play(engines: int, **arguments: Any) -> Shards:
        engine = {"model": str(llama), "skip_tokenizer_init": True, "generation_config": "vllm", "dtype": "float32"}
        engine |= {"max_model_len": 64, "seed": 0, "max_num_seqs": 8, **arguments}
        sampling = {"temperature": 1.0, "top_p": 1.0, "stop_token_ids": [258]}
        shards = Shards(tmp_path_factory.mktemp("job") / "synthetic")
        job = Job(0, engine, None, "weights", sampling, TOTAL, "requests")
        generate(job, shards, lambda: REQUESTS, lambda: vllm_python, engines=engines)
        return shards

    return play


@pytest.fixture(scope="module")
def alone(draw: Draw) -> list[dict[str, Any]]:
    """What one engine answers."""
    responses = answers(draw(1))
    assert [response["example"] for response in responses] == list(range(TOTAL))
    return responses


@pytest.fixture(autouse=True)
def nothing_is_left(family: Family) -> Iterator[None]:
    yield
    assert not family()


def test_two_engines_share_a_job(
    draw: Draw, on: Callable[[str, Event], None], alone: list[dict[str, Any]], family: Family
) -> None:
    """Each on cores of its own, and none listens on a port that other machines can reach."""
    seen: dict[str, Any] = {}

    def look() -> None:
        workers = family()
        seen["cores"] = [set(worker.cpu_affinity()) for worker in workers]
        seen["ports"] = [c.laddr for worker in workers for c in worker.net_connections() if c.status == "LISTEN"]

    on("advance", look)
    assert answers(draw(2)) == alone
    first, second = seen["cores"]
    assert os.cpu_count() == 1 or not first & second
    # torch.distributed's gloo opens a port for each group, also for a group of one
    assert {address.ip for address in seen["ports"]} <= {"127.0.0.1", "::1"}


def test_one_of_two_engines_is_killed_in_the_middle(
    draw: Draw,
    on: Callable[[str, Event], None],
    alone: list[dict[str, Any]],
    family: Family,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on("advance", lambda: os.killpg(family()[0].pid, signal.SIGKILL))
    assert answers(draw(2)) == alone
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "killed by signal 9" in warning


def kill_engine_process(family: Family) -> None:
    (engine,) = [child for child in family() if "EngineCore" in " ".join(child.cmdline())]
    engine.kill()


def test_engine_process_is_killed_once(
    draw: Draw,
    on: Callable[[str, Event], None],
    alone: list[dict[str, Any]],
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the engine in a process of its own, as on GPUs, vLLM 0.32 itself would wait for ever. Killed in the middle
    of its work, it is started again with less memory."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    on("advance", lambda: kill_engine_process(family))
    assert answers(draw(1)) == alone
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "engine process died" in warning
    assert "once more with less memory" in warning


def test_engine_process_is_killed_twice(
    draw: Draw, on: Callable[[str, Event], None], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    on("start", lambda: kill_engine_process(family))
    with pytest.raises(SpinError, match="engine process died"):
        draw(1)
