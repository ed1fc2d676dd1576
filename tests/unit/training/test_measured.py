"""What an iteration's entry says about how it ran."""

from pathlib import Path
from typing import Any

import pytest

from spin_plugin.config.specs import OpponentSpec, TrainingSpec
from spin_plugin.training.measured import add_measured, precision, read_measured, stages, versions

TRAINING: dict[str, Any] = {
    "dtype": "bfloat16",
    "fp16_key": "fp16",
    "adapter": False,
    "adapter_in_model_dtype": False,
    "optimizer": "adamw_torch",
    "optim_args": {},
    "deepspeed": None,
    "fsdp": False,
    "empty_on_other_ranks": False,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "world_size": 1,
    "num_epochs": 1,
    "max_steps": None,
    "learning_rate": 1e-6,
    "checkpoints": 1,
    "saves_optimizer": True,
    "loss_watchdog": False,
}
OPPONENT: dict[str, Any] = {
    "base_model": "m",
    "revision": None,
    "adapter": None,
    "dtype": "bfloat16",
    "trust_remote_code": False,
    "quantized": False,
    "fp8": False,
    "gptq": False,
    "overrides": None,
}


@pytest.mark.parametrize(
    ("training", "opponent", "said"),
    [
        ({"dtype": "float32"}, {}, "float32"),
        ({}, {}, "bfloat16 with fp32 masters"),
        ({"deepspeed": "zero3.json"}, {}, "bfloat16 with fp32 masters of DeepSpeed"),
        ({"optimizer": "optimi_adamw"}, {}, "bfloat16"),
        ({"adapter": True}, {}, "bfloat16 base, adapter in float32"),
        ({"adapter": True}, {"quantized": True}, "bfloat16 quantized base, adapter in float32"),
        ({}, {"fp8": True}, "fp8 with fp32 masters"),
    ],
)
def test_precision(training: dict[str, Any], opponent: dict[str, Any], said: str) -> None:
    specs = TrainingSpec(**TRAINING | training), OpponentSpec(**OPPONENT | opponent)
    assert precision(*specs, None) == said
    assert precision(*specs, "torch.bfloat16") == f"{said}; vLLM bfloat16"


def test_stages_by_hand() -> None:
    """The log's entries of training have seconds and tokens; its evaluations and its summary do not."""
    log = [
        {"step": 1, "pairs": 4, "seconds": 1.25, "tokens": 100},
        {"step": 1, "eval_loss": 1.0},
        {"step": 2, "pairs": 4, "seconds": 0.5, "tokens": 60},
        {"step": 2, "train_runtime": 9.0},
    ]
    manifest = {"generated": {"responses": 3, "tokens": 30, "seconds": 2.0}}
    found = stages(manifest, {"score": {"seconds": 0.12345, "tokens": 80}}, log)
    assert found == {
        "generate": {"seconds": 2.0, "tokens": 30},
        "score": {"seconds": 0.123, "tokens": 80},
        "train": {"seconds": 1.75, "tokens": 160},
    }
    assert stages({}, {}, [{"step": 1, "pairs": 4}]) == {}, "a run of an earlier version"


def test_versions_name_what_is_installed_and_vllm() -> None:
    found = versions({"vllm": "0.32.0"})
    assert found["vllm"] == "0.32.0"
    assert found.keys() >= {"axolotl", "torch", "transformers"}
    assert "vllm" not in versions({})


def test_measurements_are_kept_by_name(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    assert read_measured(file) == {}
    add_measured(file, "score", {"seconds": 1.0})
    add_measured(file, "agreement", {"mean": 0.1})
    add_measured(file, "agreement", {"mean": 0.2})
    assert read_measured(file) == {"score": {"seconds": 1.0}, "agreement": {"mean": 0.2}}
