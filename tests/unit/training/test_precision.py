"""Small updates are not lost: fp32 masters, optimizers that need none, and refused configurations."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from bitsandbytes.nn import Linear4bit
from conftest import Jobs
from safetensors.torch import load_file, save_file
from tiny import FSDP2, LORA, chat_rows, spin_config, write_config, write_jsonl, zero
from torch import nn

from spin_plugin.config.specs import TrainingSpec, read_training
from spin_plugin.console import SpinError
from spin_plugin.objective.decline import read_check
from spin_plugin.run.directory import RunDir
from spin_plugin.training.precision import (
    keep_4bit_weights_trainable,
    keep_masters,
    keep_outputs_in_fp32,
    needs_no_masters,
    require_masters,
    require_no_lost_updates,
)
from spin_plugin.training.saving import store_in_16_bits

STOCHASTIC = {"optimizer": "adamw_torch_8bit", "optim_args": {"bf16_stochastic_round": True}}


def config(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> TrainingSpec:
    """The training settings of a validated configuration."""
    return read_training(DictDefault({"torch_dtype": dtype, "optimizer": "adamw_torch"} | changes))


# --- refused configurations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dtype": torch.float16, "fp16": True}, "fp16"),
        ({"dtype": torch.float16, "float16": True}, "float16"),
        ({"adapter": "lora", "peft_autocast_adapter_dtype": False}, "peft_autocast_adapter_dtype"),
        ({"deepspeed": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}}, "deepspeed"),
        ({"deepspeed": "no-such-file.json"}, "deepspeed"),
    ],
)
def test_keys_that_round_updates_away_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(SpinError, match=f"^{key}: "):
        require_no_lost_updates(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        STOCHASTIC,
        {"dtype": torch.float32},
        {"dtype": torch.float16, "adapter": "lora"},
        {"adapter": "qlora", "peft_autocast_adapter_dtype": True},
        {"deepspeed": {"bf16": {"enabled": "auto"}}},
        {"dtype": torch.float32, "deepspeed": "no-such-file.json"},
    ],
)
def test_other_configurations_are_accepted(changes: dict[str, Any]) -> None:
    require_no_lost_updates(config(**changes))


def test_deepspeed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"bf16": {"enabled": True}}))
    require_no_lost_updates(config(deepspeed=str(file)))
    file.write_text("[]")
    with pytest.raises(SpinError, match=r"deepspeed: .*zero\.json must contain a JSON object"):
        require_no_lost_updates(config(deepspeed=str(file)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (STOCHASTIC, True),
        ({"optimizer": "adamw_torch_4bit", "optim_args": "block_size=128, bf16_stochastic_round=True"}, True),
        ({"optimizer": "optimi_adamw"}, True),
        ({"optimizer": "adamw_torch_8bit"}, False),
        ({"optimizer": "adamw_torch_8bit", "optim_args": {"bf16_stochastic_round": False}}, False),
        ({"optimizer": "adamw_torch", "optim_args": {"bf16_stochastic_round": True}}, False),
    ],
)
def test_only_optimizers_that_keep_small_updates_need_no_masters(changes: dict[str, Any], expected: bool) -> None:
    assert needs_no_masters(config(**changes)) is expected


# --- masters -----------------------------------------------------------------------------------------


def test_4bit_weights_pass_gradients_on_after_evaluation() -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would replace them by a form without a gradient."""
    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=True, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.load_state_dict({"weight": torch.randn(64, 64), "bias": torch.zeros(64)})
    layer = layer.to("cpu")  # quantizes
    keep_4bit_weights_trainable(layer)
    states = torch.randn(3, 64)
    with torch.no_grad():
        expected = layer.eval()(states)
    states.requires_grad_()
    found = layer.train()(states)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert states.grad is not None
    assert states.grad.abs().sum() > 1


def half_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False)).bfloat16()
    model[2].weight = model[0].weight  # tied, like an LM head
    model[1].bias.requires_grad_(False)
    return model


def dtypes(model: nn.Module) -> list[torch.dtype]:
    return [model[0].weight.dtype, model[1].weight.dtype, model[1].bias.dtype]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [torch.float32, torch.float32, torch.bfloat16]),  # frozen weights take no extra memory
        ({"fsdp_config": {"reshard_after_forward": True}}, [torch.float32] * 3),
        ({"deepspeed": "zero.json"}, [torch.bfloat16] * 3),
        (STOCHASTIC, [torch.bfloat16] * 3),
        (STOCHASTIC | {"adapter": "lora"}, [torch.float32, torch.float32, torch.bfloat16]),
        ({"adapter": "lora", "fsdp_config": {"reshard_after_forward": True}}, [torch.bfloat16] * 3),
    ],
)
def test_masters(changes: dict[str, Any], expected: list[torch.dtype]) -> None:
    model = half_model()
    keep_masters(config(**changes), model)
    assert dtypes(model) == expected
    assert model[2].weight is model[0].weight


def share_changed(model: nn.Linear, *, steps: int = 50, rate: float = 5e-7) -> torch.Tensor:
    """Train with AdamW and return the share of weights that changed."""
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(64, 64, generator=generator)
    for _ in range(steps):
        inputs = torch.randn(32, 64, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(inputs).float() - inputs @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (model.weight != before).double().mean()


def test_bf16_weights_barely_move_and_masters_do() -> None:
    model = nn.Linear(64, 64, bias=False)
    nn.init.normal_(model.weight, std=0.02)
    model = model.bfloat16()
    assert share_changed(model) < 0.05
    keep_masters(config(), model)
    assert share_changed(model) > 0.9


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw_torch_8bit"}])
def test_16_bit_weights_in_the_optimizer_are_refused(changes: dict[str, Any]) -> None:
    model = half_model()
    with pytest.raises(SpinError, match=r"384 weights would be trained in 16 bits.*bf16_stochastic_round"):
        require_masters(
            config(**changes), torch.optim.SGD(p for p in model.parameters() if p.requires_grad).param_groups
        )
    keep_masters(config(**changes), model)
    require_masters(config(**changes), torch.optim.SGD(p for p in model.parameters() if p.requires_grad).param_groups)


def test_fsdp_outputs_stay_in_fp32() -> None:
    """accelerate's default of bf16 rounds a sum of 300 to steps of 2."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16, "otherwise keep_outputs_in_fp32 can be removed"
    keep_outputs_in_fp32(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy.output_dtype is None
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    keep_outputs_in_fp32(SimpleNamespace(state=SimpleNamespace()))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_local_rank_0_copies_weights(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    model, before = half_model(), half_model()
    keep_masters(config(fsdp_config={"cpu_ram_efficient_loading": True}), model)
    assert dtypes(model) == [torch.float32] * 3
    assert rank == "1" or torch.equal(model[1].weight, before[1].weight.float())


def test_stored_fp32_tensors_are_converted_and_others_kept(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(4, 4),
        "router": torch.randn(4),
        "half": torch.randn(4).bfloat16(),
        "n": torch.arange(3),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "hidden_size": 4}))
    store_in_16_bits(tmp_path, [file], torch.bfloat16, ["router"])
    stored = load_file(file)
    assert torch.equal(stored["a"], tensors["a"].bfloat16())
    assert all(torch.equal(stored[name], tensors[name]) for name in ("router", "half", "n"))
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "bfloat16", "hidden_size": 4}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- axolotl train -----------------------------------------------------------------------------------

BF16 = {"bf16": True}
SLOW = BF16 | {"learning_rate": 5e-7}
ONE_PROCESS = {
    "fp32": {},
    "bf16": BF16,
    "stochastic": BF16 | STOCHASTIC,
    "lora": BF16 | LORA,
    "slow": SLOW,
    "slow fp32": {"learning_rate": 5e-7},
}
TWO_PROCESSES = {
    "ddp": BF16,
    "fsdp2": BF16 | FSDP2,
    "zero2": BF16 | zero(2, bf16=True),
    "zero3": BF16 | zero(3, bf16=True),
    "slow fsdp2": SLOW | FSDP2,
    "slow zero2": SLOW | zero(2, bf16=True),
    "slow zero3": SLOW | zero(3, bf16=True),
}
AT_FULL_RATE = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path, run_jobs: Callable[..., None]) -> Path:
    """A directory with a run of each setup: 96 steps at a small learning rate, all on the same responses."""
    directory = tmp_path_factory.mktemp("precision")
    data = write_jsonl(directory / "chat.jsonl", chat_rows(32))
    save = {"save_strategy": "epoch", "save_total_limit": 1}
    base = spin_config(directory, llama, data, num_epochs=16, learning_rate=2e-5, val_set_size=8, **save)
    base["spin"] |= {"iterations": 1, "beta": 1.0}
    run_jobs((write_config(directory, base | BF16), 1), command="preprocess")
    (directory / "run/run.json").unlink()  # the setups' configurations differ
    jobs = []
    for processes, setups in ((1, ONE_PROCESS), (2, TWO_PROCESSES)):
        for name, changes in setups.items():
            shutil.copytree(directory / "run", directory / name / "run")
            own = base | changes | {"output_dir": str(directory / name / "run"), "micro_batch_size": 4 // processes}
            jobs.append((write_config(directory / name, own), processes))
    run_jobs(*jobs)
    return directory


def movement(file: Path, start: Path) -> torch.Tensor:
    """The change of all matrices, as one vector."""
    before, after = load_file(start / "model.safetensors"), load_file(file)
    matrices = sorted(name for name, weight in before.items() if weight.dim() > 1)
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in matrices])


def checkpoint(run: Path) -> Path:
    (found,) = (run / "iteration-0").glob("checkpoint-*")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "stochastic", *AT_FULL_RATE])
def test_stored_weights_move_as_in_fp32(trained: Path, llama: Path, name: str) -> None:
    exact = movement(trained / "fp32/run/iteration-0/model.safetensors", llama)
    file = trained / name / "run/iteration-0/model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    moved = movement(file, llama)
    assert (moved @ exact) / (exact @ exact) == pytest.approx(1, abs=0.1)
    runs = [RunDir(trained / setup / "run") for setup in ("fp32", name)]
    assert runs[1].finished() == 1
    ends = [run.iteration(0).last_metrics()["spin/reward_margin"] for run in runs]
    assert ends[1] == pytest.approx(ends[0], rel=0.05), "reaches the same margin"
    opponent = load_file(runs[1].iteration(0).pairs / "opponent-train.safetensors")["logps"]
    assert (opponent != opponent.bfloat16()).double().mean() > 0.9, "log-probs are summed in fp32"


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_FULL_RATE)
def test_two_processes_match_the_losses_of_one(trained: Path, name: str) -> None:
    """Step by step, within the effect of rounding in another order in 16 bits."""
    curves = [
        [
            entry["spin/loss"]
            for entry in RunDir(trained / setup / "run").iteration(0).read_log()
            if "spin/loss" in entry
        ]
        for setup in ("bf16", name)
    ]
    assert curves[1] == pytest.approx(curves[0], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "stochastic", *AT_FULL_RATE])
def test_held_out_responses_gain_as_in_fp32(trained: Path, name: str) -> None:
    """Scored after the masters are rounded, with sharded weights too."""
    states = [RunDir(trained / setup / "run").read_state() for setup in ("fp32", name)]
    exact, found = (read_check(state.finished[0], "held_out") for state in states)
    assert found.prompts == exact.prompts == 8
    assert found.difference == pytest.approx(exact.difference, rel=0.1)


@pytest.mark.slow
def test_masters_move_at_the_papers_learning_rate(trained: Path, llama: Path) -> None:
    """Read from the checkpoint, because the final model is rounded."""
    moved = movement(checkpoint(trained / "slow/run") / "model.safetensors", llama)
    assert (moved != 0).double().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slow", "slow fsdp2", "slow zero2", "slow zero3"])
def test_movements_below_a_bf16_step_reach_the_loss_and_the_saved_model(trained: Path, llama: Path, name: str) -> None:
    """48e-6 at most, less than half a bf16 step of most weights: rounded to nearest from the start, margins stay 0."""
    runs = [RunDir(trained / setup / "run").iteration(0) for setup in ("slow fp32", name)]
    exact, found = (run.last_metrics()["spin/reward_margin"] for run in runs)
    assert found == pytest.approx(exact, rel=0.2)
    exact_movement, moved = (movement(run.path / "model.safetensors", llama) for run in runs)
    assert (moved @ exact_movement) / (exact_movement @ exact_movement) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_adapter_is_trained_in_fp32(trained: Path) -> None:
    weights = load_file(trained / "lora/run/iteration-0/adapter_model.safetensors")
    dithered = [tensor for name, tensor in weights.items() if "lora_A" in name]
    assert all((tensor != tensor.bfloat16()).double().mean() > 0.99 for tensor in dithered)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in weights.values())


@pytest.mark.slow
def test_bf16_full_is_refused_before_anything_is_written(
    tmp_path: Path, llama: Path, chat_data: Path, exit_codes: Jobs
) -> None:
    config = write_config(tmp_path, spin_config(tmp_path, llama, chat_data, bf16="full"))
    assert exit_codes([{"config": str(config), "processes": 1}]) == {str(config): 1}
    said = (tmp_path / "rank-0.log").read_text()
    (error,) = [line for line in said.splitlines() if line.startswith("spin: error: ")]
    assert "bf16: full" in error
    assert not (tmp_path / "run").exists()
