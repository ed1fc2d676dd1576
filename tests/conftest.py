"""Fixtures: tiny models, and commands run as users run them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

# Set before `tiny` imports huggingface_hub and torch, which read these variables once. Tiny models gain nothing from a
# second thread. If a command uses two anyway, waiting threads must sleep: spinning took six times as long while another
# test used one of the cores.
os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# Tokenize in the process itself: a worker imports all of Axolotl for a handful of rows, and from `datasets` 5 on even a
# single one is a process of its own.
os.environ["AXOLOTL_DATASET_NUM_PROC"] = "0" if int(version("datasets").partition(".")[0]) >= 5 else "1"

from tiny import chat_rows, make_model, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Capabilities of a GPU machine, as Axolotl's validators expect them.
GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, the longest before all, so that short ones can fill the remaining workers."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.stem != "test_quickstart"))


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    output: str
    """Combined stdout and stderr."""

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
        timeout=2400,  # generous, because machines are shared
    )
    return Finished(done.returncode, done.stdout)


@pytest.fixture(scope="session")
def command() -> Callable[..., Finished]:
    return run_command


Jobs = Callable[[list[dict[str, Any]]], dict[str, int]]


@pytest.fixture(scope="session")
def exit_codes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Run jobs with one shared import of Axolotl (several_processes.py); returns the exit codes of failed ones by
    config."""
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
        requests, replies = server.stdin, server.stdout

        def run(jobs: list[dict[str, Any]]) -> dict[str, int]:
            requests.write(json.dumps(jobs) + "\n")
            reply = replies.readline()
            assert reply, log.read_text()[-3000:]
            return json.loads(reply)

        yield run


@pytest.fixture(scope="session")
def run_jobs(exit_codes: Jobs) -> Callable[..., None]:
    """Run jobs, given as (config, processes), all with the same keyword options; asserts that none fails."""

    def run(*jobs: tuple[Path, int], **more: Any) -> None:
        failed = exit_codes([{"config": str(config), "processes": processes} | more for config, processes in jobs])
        logs = [log for config in failed for log in sorted(Path(config).parent.glob("rank-*.log"))]
        assert not failed, "\n".join(log.read_text()[-2500:] for log in logs)

    return run


Children = Callable[[], list[psutil.Process]]


@pytest.fixture
def children() -> Children:
    """Return the running processes that this test has started, without leftovers of earlier tests."""
    earlier = set(psutil.Process().children(recursive=True))

    def running() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [child for child in found if child not in earlier and child.status() != psutil.STATUS_ZOMBIE]

    return running


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """vLLM's interpreter; without one, tests fail instead of being skipped."""
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
    """Register the plugin, as Axolotl does after reading a configuration that lists it."""
    from axolotl.integrations.base import PluginManager

    PluginManager._instance = None
    PluginManager.get_instance().register("spin_plugin.SpinPlugin")
    yield
    PluginManager._instance = None
