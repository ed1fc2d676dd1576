"""Two processes train: they compare vLLM with the policy together, and where one is killed alone the other one ends.

Plugin, trainer and what `axolotl train` calls are the real ones (several_processes.py), the responses are vLLM's.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs
from safetensors.torch import load_file
from tiny import chat_rows, spin_config, write_config, write_jsonl

from spin_plugin.generation.shards import Shards
from spin_plugin.opponent.agreement import EXACT
from spin_plugin.run.directory import RunDir
from spin_plugin.run.processes import RERUN

pytestmark = pytest.mark.slow
Response = dict[str, Any]


def without_most(responses: list[Response]) -> list[Response]:
    for response in responses[:-6]:  # four of them are held out
        del response["logps"]
    return responses


def without_any(responses: list[Response]) -> list[Response]:
    return [{key: value for key, value in response.items() if key != "logps"} for response in responses]


def of_another_model(responses: list[Response]) -> list[Response]:
    return [response | {"logps": [value + 0.01 for value in response.get("logps", [])]} for response in responses]


# What becomes of vLLM's responses before they are trained on
CHANGES: dict[str, Callable[[list[Response]], list[Response]]] = {
    "calm": lambda responses: responses,
    "killed": lambda responses: responses,
    "missing": without_most,
    "unknown": without_any,
    "wrong": of_another_model,
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, llama: Path, play: Callable[..., None], serve: Jobs) -> Path:
    """A directory with a run of each, all from one generation."""
    directory = tmp_path_factory.mktemp("together")
    data = write_jsonl(directory / "chat.jsonl", chat_rows(24))
    config = spin_config(directory, llama, data, val_set_size=4, num_epochs=3, micro_batch_size=2, save_steps=1)
    config["spin"] |= {"iterations": 1, "equal_pairs": "drop"}
    play((write_config(directory, config), 1), command="preprocess")
    jobs = []
    for name, change in CHANGES.items():
        run = directory / name / "run"
        shutil.copytree(directory / "run", run)
        shards = Shards(RunDir(run).iteration(0).synthetic)
        shards.write(0, change(shards.read(0)))
        job = {"config": str(write_config(directory / name, config | {"output_dir": str(run)})), "processes": 2}
        jobs += [job | {"kill": 1}, job | {"kill": 0}, job] if name == "killed" else [job]
    assert list(serve(jobs)) == [str(directory / "wrong/config.yml")]
    return directory


def said(together: Path, name: str, rank: int = 0) -> list[str]:
    """The plugin's lines in the output of a rank."""
    return [line for line in output(together, name, rank).splitlines() if line.startswith("spin: ")]


def output(together: Path, name: str, rank: int) -> str:
    return (together / name / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize(("name", "responses"), [("calm", 20), ("missing", 2)])
def test_how_far_vllm_and_policy_are_apart_is_said_once(together: Path, name: str, responses: int) -> None:
    """With `equal_pairs: drop`, held-out prompts, and only some responses that vLLM has scored."""
    (line,) = [line for line in said(together, name) if "vLLM and the policy" in line]
    found = re.fullmatch(
        r"spin: iteration 0: vLLM and the policy are (\S+) nats a token apart on average \(KL (\S+), largest (\S+)\) "
        rf"in \d+ tokens of {responses} responses",
        line,
    )
    assert found, line
    mean, kl, largest = map(float, found.groups())
    assert 0 < mean < EXACT / 100
    assert mean < largest < EXACT
    assert kl < largest**2
    assert not [line for line in said(together, name, rank=1) if "vLLM and the policy" in line]


def test_where_nothing_can_be_compared_it_is_said_once(together: Path) -> None:
    (line,) = [line for line in said(together, "unknown") if "is not known" in line]
    assert line.startswith("spin: warning: iteration 0: whether vLLM drew from the model that training starts from")
    assert RunDir(together / "unknown/run").finished() == 1


def test_a_wrong_opponent_is_refused_and_the_other_process_ends_in_one_line(together: Path) -> None:
    """The launcher ends it, or it sees that the first one is gone, whatever comes first."""
    (error,) = [line for line in said(together, "wrong") if line.startswith("spin: error: ")]
    assert "vLLM and the policy are 0.01 nats a token apart" in error
    assert "drawn from another model" in error
    (ends,) = [line for line in said(together, "wrong", rank=1) if line.startswith("spin: error: ")]
    assert ends.startswith("spin: error: rank 1 of 2 stopped: ")
    assert RERUN in ends
    assert "Traceback" not in output(together, "wrong", 0) + output(together, "wrong", 1)
    assert RunDir(together / "wrong/run").finished() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_is_killed_in_training_the_other_one_ends_in_one_line(together: Path, rank: int) -> None:
    """No launcher ended it."""
    (error,) = [line for line in said(together, "killed", 1 - rank) if line.startswith("spin: error: ")]
    why = f"rank {rank} exited (killed, unless its log shows an error)"
    assert error == f"spin: error: rank {1 - rank} of 2 stopped: {why}; {RERUN}"
    assert "Traceback" not in output(together, "killed", 1 - rank)


def test_after_two_such_kills_the_run_ends_as_one_left_alone_to_the_bit(together: Path) -> None:
    calm, killed = (RunDir(together / name / "run") for name in ("calm", "killed"))
    assert calm.finished() == killed.finished() == 1
    weights = [load_file(run.iteration(0).path / "model.safetensors") for run in (calm, killed)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    losses = [[e["spin/loss"] for e in run.iteration(0).logged() if "spin/loss" in e] for run in (calm, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 15
