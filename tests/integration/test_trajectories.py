"""Training follows the same trajectory for any number of processes and any way to shard the model.

One process; two with DDP, FSDP2, ZeRO-2 and ZeRO-3; with and without LoRA; compiled; as a Ray worker: the same pairs
give the same losses, margins and final weights up to rounding. Plugin, trainer, collator, opponent store and the
function that `axolotl train` calls are real. Only the launch differs: several_processes.py forks the ranks and patches
Axolotl and accelerate to use CPUs.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FSDP2, LORA, chat_rows, spin_config, write_config, write_jsonl, zero

from spin_plugin.objective.decline import read_check
from spin_plugin.run.directory import RunDir

pytestmark = pytest.mark.slow


FEW_TOKENS = {"spin": {"tokens_per_micro_batch": 60}}  # one or two of a step's four pairs
ALONE = {"full": {}, "lora": LORA, "grouped": {}}
TOGETHER = {
    "full-ddp": {},
    "full-fsdp2": FSDP2,
    "full-zero2": zero(2),
    "full-zero3": zero(3),
    "lora-ddp": LORA,
    "lora-fsdp2": LORA | FSDP2,
    "grouped-ddp": {},
    "grouped-fsdp2": FSDP2,
    # an item of the data loader holds several micro-batches, of which only the last sums gradients over the ranks
    "grouped-tokens-ddp": FEW_TOKENS,
    "grouped-tokens-fsdp2": FEW_TOKENS | FSDP2,
    "grouped-tokens-zero2": FEW_TOKENS | zero(2),
}
OTHERWISE = {
    "full-checkpointing": {"gradient_checkpointing": True},
    # tests dynamo's graph capture; compiling for the CPU takes a minute and gave the same losses
    "full-compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "full-lengths": {"group_by_length": True},
    "full-ray": {"use_ray": True},
    "grouped-tokens": FEW_TOKENS,
    "grouped-single": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},  # micro-batches of a prompt
}
SAME = [name for name in (*TOGETHER, *OTHERWISE) if name != "full-lengths"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path, run_jobs: Callable[..., None]) -> Path:
    """A directory with a run of each variant, all from one generation, the grouped ones from another."""
    directory = tmp_path_factory.mktemp("processes")
    # 21 for training: the last step of an epoch has one pair, so one of two ranks only gets repeated ones
    data = write_jsonl(directory / "chat.jsonl", chat_rows(29))
    config = spin_config(directory, llama, data, val_set_size=8, eval_strategy="epoch", num_epochs=2)
    config["spin"] |= {"beta": 1.0}
    # three pairs of a prompt, which fit into the micro-batch of one process but not of two
    generation = config["spin"]["generation"] | {"num_generations": 3}
    grouped = config["spin"] | {"group_prompts": "auto", "generation": generation}
    prepared = {"separate": config, "grouped": config | {"spin": grouped}}
    for name, changed in prepared.items():
        (directory / name).mkdir()
        changed["output_dir"] = str(directory / name / "prepared")
        run_jobs((write_config(directory / name, changed), 1), command="preprocess")
        (directory / name / "prepared/run.json").unlink()  # the variants' configurations differ
    jobs = []
    for processes, variants in ((1, ALONE | OTHERWISE), (2, TOGETHER)):
        for name, changes in variants.items():
            source = "grouped" if name.startswith("grouped") else "separate"
            shutil.copytree(directory / source / "prepared", directory / name / "run")
            own = {"output_dir": str(directory / name / "run"), "micro_batch_size": 4 // processes} | changes
            own["spin"] = prepared[source]["spin"] | changes.get("spin", {})
            jobs.append((write_config(directory / name, prepared[source] | own), processes))
    run_jobs(*jobs)
    return directory


def curve(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "iteration-0/metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def run_of(trained: Path, name: str) -> Path:
    return trained / name / "run"


@pytest.mark.parametrize("name", [*ALONE, *TOGETHER, *OTHERWISE])
def test_training_starts_at_loss_ln_2_and_margin_0(trained: Path, name: str) -> None:
    run = run_of(trained, name)
    assert curve(run, "spin/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve(run, "spin/reward_margin")[0] == pytest.approx(0, abs=1e-5)
    assert RunDir(run).finished() == 1


@pytest.mark.parametrize("name", SAME)
def test_every_variant_follows_the_trajectory_of_one_process(trained: Path, llama: Path, name: str) -> None:
    alone, together = run_of(trained, name.partition("-")[0]), run_of(trained, name)
    for metric in ("loss", "spin/loss", "spin/reward_margin", "eval_spin/loss", "eval_spin/reward_margin"):
        assert len(curve(alone, metric)) >= 2
        assert curve(together, metric) == pytest.approx(curve(alone, metric), abs=2e-3), metric
    stored = [load_file(run / "iteration-0/pairs/opponent-train.safetensors")["logps"] for run in (alone, together)]
    torch.testing.assert_close(stored[1], stored[0], atol=1e-3, rtol=0)
    rewards = [load_file(RunDir(run).iteration(0).rewards("train"))["rewards"] for run in (alone, together)]
    torch.testing.assert_close(rewards[1], rewards[0], atol=5e-2, rtol=1e-2)
    checked, reference = (read_check(RunDir(run).read_state().finished[0], "held_out") for run in (together, alone))
    assert checked.prompts == reference.prompts == 8
    assert checked.difference == pytest.approx(reference.difference, abs=2e-3)
    assert checked.interval == pytest.approx(reference.interval, abs=2e-3)
    weights = "adapter_model" if name.startswith("lora") else "model"
    first, second = (load_file(run / f"iteration-0/{weights}.safetensors") for run in (alone, together))
    assert first.keys() == second.keys()
    # for a full model, compare updates, which are much smaller than the weights
    start = load_file(llama / "model.safetensors") if weights == "model" else {}
    updates = {key: tensor - start.get(key, 0) for key, tensor in first.items()}
    apart = sum((second[key] - first[key]).square().sum() for key in updates)
    assert (apart / sum(tensor.square().sum() for tensor in updates.values())).sqrt() < 1e-2
