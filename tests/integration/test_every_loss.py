"""Every loss trains through the real command and starts where its equation says; new ones run two iterations."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from references import naive_logp
from safetensors.torch import load_file
from tiny import chat_rows, spin_config, write_config, write_jsonl
from transformers import AutoModelForCausalLM

from spin_plugin.data.table import open_table
from spin_plugin.generation.shards import Shards
from spin_plugin.objective.losses import LOSSES
from spin_plugin.run.directory import RunDir

pytestmark = pytest.mark.slow

BETA, WEIGHT = 0.05, 0.5
RUNS: dict[str, dict[str, Any]] = {
    "space": {"loss_type": "space", "space_mu": 2.0, "real_penalty": 1.0, "sft_weight": 0.5},
    "t_spin": {"loss_type": "t_spin", "t_spin_weight": WEIGHT, "group_prompts": "auto"},
}
OF_MARGIN = [name for name in LOSSES if name not in RUNS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path, run_jobs: Callable[..., None]) -> Path:
    """A directory with a run of each loss, all from one generation of iteration 0.

    One step per iteration. Losses of the margin alone run one iteration: the next differs only in its opponent.
    """
    directory = tmp_path_factory.mktemp("losses")
    data = write_jsonl(directory / "chat.jsonl", chat_rows(6))
    config = spin_config(directory, llama, data, gradient_accumulation_steps=8)
    config["spin"] |= {"beta": BETA, "generation": config["spin"]["generation"] | {"num_generations": 2}}
    run_jobs((write_config(directory, config), 1), command="preprocess")
    (directory / "run/run.json").unlink()  # the configurations differ
    jobs = []
    for name, spin in (RUNS | {name: {"loss_type": name, "iterations": 1} for name in OF_MARGIN}).items():
        shutil.copytree(directory / "run", directory / name / "run")
        own = config | {"output_dir": str(directory / name / "run"), "spin": config["spin"] | spin}
        jobs.append((write_config(directory / name, own), 1))
    run_jobs(*jobs)
    run_jobs(*jobs[: len(RUNS)])
    return directory


def first(run: Path, iteration: int) -> dict[str, float]:
    """Return the metrics of an iteration's first step, which has all pairs."""
    entry = json.loads((run / f"iteration-{iteration}/metrics.jsonl").read_text().splitlines()[0])
    assert entry["pairs"] == len(pairs(run, iteration))
    return entry


def pairs(run: Path, iteration: int) -> list[dict[str, Any]]:
    return open_table(run / f"iteration-{iteration}/pairs/train.arrow").to_list()


@pytest.mark.parametrize("name", LOSSES)
def test_both_iterations_finish(trained: Path, name: str) -> None:
    run = trained / name / "run"
    assert RunDir(run).finished() == (2 if name in RUNS else 1)
    for iteration in range(RunDir(run).finished()):
        assert first(run, iteration)["spin/reward_margin"] == pytest.approx(0, abs=1e-5)
        assert math.isfinite(first(run, iteration)["grad_norm"])
        assert first(run, iteration)["grad_norm"] > 0


@pytest.mark.parametrize("name", [*OF_MARGIN, "space"])
def test_first_loss_is_the_start_in_the_reference(trained: Path, name: str) -> None:
    """With space, mu = 2, plus the SFT term: gamma times the mean negative log-prob per token of the real responses."""
    found = first(trained / name / "run", 0)
    expected = {"logistic": math.log(2), "space": math.log(3) + 2 * math.log(1.5)}.get(name, 1.0)
    if name == "space":
        expected -= 0.5 * found["spin/logp_real_per_token"]
    assert found["spin/loss"] == pytest.approx(expected, abs=1e-4)
    assert found["loss"] == pytest.approx(expected, abs=1e-4)


def logistic(z: float) -> float:
    return math.log(1 + math.exp(-z))


def test_t_spin_starts_without_its_second_term(trained: Path) -> None:
    """From the stored log-probs: at the first step the policy is the opponent. Its pairs are those of other losses."""
    run = trained / "t_spin/run"
    stored = load_file(run / "iteration-0/pairs/opponent-train.safetensors")["logps"].view(-1, 2)
    expected = [logistic(BETA * (real - synthetic)) for real, synthetic in stored.tolist()]
    assert first(run, 0)["spin/loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    files = [trained / name / "run/iteration-0/pairs/train.arrow" for name in ("t_spin", "space")]
    assert files[0].read_bytes() == files[1].read_bytes()


@torch.no_grad()
def test_second_iteration_of_t_spin_compares_with_iteration_0(trained: Path) -> None:
    """Pair by pair, one token at a time: y0 is iteration 0's sample of the same number; history pairs have none."""
    run = trained / "t_spin/run"
    drawn: dict[int, list[list[int]]] = {}
    for response in Shards(run / "iteration-0/synthetic").responses():
        drawn.setdefault(response["example"], []).append(response["tokens"])
    model = AutoModelForCausalLM.from_pretrained(run / "iteration-0").eval()
    losses, seen = [], {0: 0, 1: 0}
    for pair in pairs(run, 1):
        sample = seen[pair["iteration"]] % 2
        seen[pair["iteration"]] += 1
        initial = drawn[pair["example"]][sample]
        assert pair["initial"] == ([] if initial == pair["synthetic"] else initial)
        assert pair["length"] == sum(len(pair[name]) for name in ("prompt", "real", "synthetic", "initial"))
        real, synthetic = (naive_logp(model, pair["prompt"], pair[name]) for name in ("real", "synthetic"))
        loss = logistic(BETA * (real - synthetic))
        if pair["initial"]:
            loss += WEIGHT * logistic(BETA * (synthetic - naive_logp(model, pair["prompt"], pair["initial"])))
        losses.append(loss)
    assert seen == {0: 12, 1: 12}
    assert not any(pair["initial"] for pair in pairs(run, 1) if pair["iteration"] == 0)
    assert any(pair["initial"] for pair in pairs(run, 1))
    assert first(run, 1)["spin/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize("iteration", [0, 1])
def test_other_losses_have_no_initial_responses(trained: Path, iteration: int) -> None:
    directory = trained / "space/run" / f"iteration-{iteration}/pairs"
    assert "initial" not in open_table(directory / "train.arrow").column_names
    assert "iteration 0's responses" not in json.loads((directory / "key").read_text())
