"""Fixtures: tiny models that cost a moment, and commands run as the user runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

# huggingface_hub and torch read their variables once, when `tiny` imports them. Tiny models gain nothing from a second
# thread. Where a command takes two all the same, a thread that waits for the other must sleep: spinning, both took six
# times as long while another test had one of the cores.
os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

from tiny import chat_rows, make_model, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What a machine with GPUs has; Axolotl's validators ask for it.
GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, and of them the longest: short ones then fill up the time of the worker that is left idle."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.stem != "test_quickstart"))


@dataclass(frozen=True)
class Finished:
    """A command that came to its end."""

    code: int
    output: str
    """stdout and stderr together."""

    @property
    def errors(self) -> list[str]:
        """The plugin's one-line errors."""
        return [line for line in self.output.splitlines() if line.startswith("spin: error: ")]


def run_command(*command: str | Path, directory: Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command in `directory` with the test interpreter's `bin` first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | {"PATH": path} | dict(environment or {})
    done = subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=2400,  # that nothing waits for ever; machines are shared
    )
    return Finished(done.returncode, done.stdout)


@pytest.fixture(scope="session")
def command() -> Callable[..., Finished]:
    return run_command


Jobs = Callable[[list[dict[str, Any]]], dict[str, int]]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Play jobs with one import of Axolotl for all tests (several_processes.py); returns the exit codes of those that
    failed, by their configurations."""
    log = tmp_path_factory.mktemp("jobs") / "log"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            [sys.executable, ROOT / "tests/several_processes.py"],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
        ) as server,
    ):
        assert server.stdin and server.stdout
        orders, answers = server.stdin, server.stdout

        def play(jobs: list[dict[str, Any]]) -> dict[str, int]:
            orders.write(json.dumps(jobs) + "\n")
            answer = answers.readline()
            assert answer, log.read_text()[-3000:]
            return json.loads(answer)

        yield play


@pytest.fixture(scope="session")
def play(serve: Jobs) -> Callable[..., None]:
    """Play jobs, each a configuration and a number of processes; keywords are of all of them. None may fail."""

    def play(*jobs: tuple[Path, int], **more: Any) -> None:
        failed = serve([{"config": str(config), "processes": processes} | more for config, processes in jobs])
        logs = [log for config in failed for log in sorted(Path(config).parent.glob("rank-*.log"))]
        assert not failed, "\n".join(log.read_text()[-2500:] for log in logs)

    return play


Family = Callable[[], list[psutil.Process]]


@pytest.fixture
def family() -> Family:
    """The living processes that the test has started; those of earlier tests (a helper of `datasets`) are left out."""
    earlier = set(psutil.Process().children(recursive=True))

    def living() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [child for child in children if child not in earlier and child.status() != psutil.STATUS_ZOMBIE]

    return living


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """vLLM's interpreter; without one the tests fail, they are never skipped."""
    from spin_plugin.generation.python import vllm_python

    return vllm_python(None)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one turn."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", chat_rows(24))


@pytest.fixture
def registered() -> Iterator[None]:
    """The plugin, as Axolotl has it once it has read a configuration that names it."""
    from axolotl.integrations.base import PluginManager

    PluginManager._instance = None
    PluginManager.get_instance().register("spin_plugin.SpinPlugin")
    yield
    PluginManager._instance = None
