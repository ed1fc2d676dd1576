"""The planned iterations: steps, warm-up and tokens, against a real trainer's arguments and pairs built one by one."""

from pathlib import Path

import numpy as np
import pytest
from axolotl.integrations.base import PluginManager
from tiny import spin_config
from transformers import TrainingArguments

from spin_plugin.console import collected
from spin_plugin.doctor.checkup import Skipped
from spin_plugin.doctor.data import Lengths
from spin_plugin.doctor.machine import Device
from spin_plugin.doctor.memory import ModelSize
from spin_plugin.doctor.schedule import plan, tokens_per_epoch, warmup_steps
from spin_plugin.doctor.settings import read_settings
from spin_plugin.doctor.speed import fastest, hours, llama_parameters
from spin_plugin.model.layout import Pair, shared_prefix_batch
from spin_plugin.run.state import RunState


@pytest.mark.parametrize(
    ("steps", "warmup", "ratio", "expected"),
    [(93, None, 0.1, 9), (93, 20, None, 20), (93, 0, None, 0), (5, None, 0.3, 2), (1000, None, None, 30)],
)
def test_warmup_is_the_trainer_s(
    tmp_path: Path, steps: int, warmup: float | None, ratio: float | None, expected: int
) -> None:
    found = warmup_steps(steps, warmup, ratio)
    assert found == expected
    assert TrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=found).get_warmup_steps(steps) == expected


@pytest.mark.parametrize(("pairs", "grouped"), [(1, True), (1, False), (3, True), (3, False)])
def test_tokens_are_those_of_the_rows_that_the_model_computes(pairs: int, grouped: bool) -> None:
    made = [Pair([1] * 5, [2] * 4, [3] * 6) for _ in range(pairs)]
    rows = [made] if grouped else [[pair] for pair in made]
    computed = sum(shared_prefix_batch(row, grouped=grouped)["input_ids"].numel() for row in rows)
    assert tokens_per_epoch(5, 4, 6, pairs, grouped=grouped) == computed


def test_plan_follows_the_schedule(tmp_path: Path, llama: Path, chat_data: Path) -> None:
    """Three iterations with their own settings, on 100 prompts of 10 tokens with real responses of 20."""
    schedule = [{}, {"learning_rate": "2e-7", "beta": 0.5}, {"num_epochs": 2, "generation": {"num_generations": 2}}]
    config = spin_config(
        tmp_path, llama, chat_data, learning_rate=1e-6, gradient_accumulation_steps=2,
        warmup_steps=None, warmup_ratio=0.1, spin={"iterations": 3, "num_prompts": 80, "schedule": schedule},
    )  # fmt: skip
    PluginManager._instance = None
    settings = read_settings(config, 2)
    PluginManager._instance = None
    assert settings is not None
    found = Lengths(np.full(100, 10), np.full(100, 20), held_out=7, scale=1.0)
    first, second, third = plan(settings, found, 5.0)
    assert [one.pairs for one in (first, second, third)] == [80, 160, 240]  # of one, two and three responses
    assert [one.steps for one in (first, second, third)] == [5, 10, 2 * 15]  # of 4 × 2 × 2 pairs
    assert [one.warmup_steps for one in (first, second, third)] == [0, 2, 3]  # Axolotl makes 1 a 2
    assert [one.learning_rate for one in (first, second, third)] == [1e-6, 2e-7, 1e-6]
    assert [one.beta for one in (first, second, third)] == [0.1, 0.5, 0.1]
    assert [one.generated for one in (first, second, third)] == [87 * 5, 87 * 5, 87 * 2 * 5]
    assert [one.trained for one in (first, second, third)] == [80 * 35, 80 * 40, 2 * 80 * 45]


def test_speed_is_the_benchmark_s() -> None:
    run = {"unique_tokens": [1000, 2000, 900], "seconds": {"ours": [1.0, 1.0, 1.0]}}
    assert fastest([run, {"unique_tokens": [1], "seconds": {"trl": [1.0]}}]) == 1000
    assert fastest([]) is None
    assert llama_parameters(16, 2048, 128_256) == pytest.approx(1.236e9, rel=0.001)  # Llama 3.2 1B


H200 = "NVIDIA H200"


@pytest.mark.parametrize(
    ("device", "parameters", "measured"),
    [(H200, 1.24e9, True), (H200, 7e9, False), ("NVIDIA A100", 1.24e9, False)],
)
def test_hours_need_a_measurement(
    tmp_path: Path, llama: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch, device: str, parameters: float,
    measured: bool,
) -> None:  # fmt: skip
    """On the GPU and of the size of a benchmark, whose fastest run trained 38,900 tokens a second; else none."""
    PluginManager._instance = None
    settings = read_settings(spin_config(tmp_path, llama, chat_data, bf16=True), 1)
    PluginManager._instance = None
    assert settings is not None
    monkeypatch.setattr("spin_plugin.doctor.speed.devices", lambda: [Device(device, 150_000_000_000, gpu=True)])
    planned = plan(settings, Lengths(np.full(10**6, 100), np.full(10**6, 200), held_out=0, scale=1.0), 200.0)
    size = ModelSize(int(parameters), 0, 0, 1)
    if measured:
        with collected() as messages:
            assert hours(settings, size, planned) is None, "how long generation takes is unknown"
        assert "generating not measured, training 8.5 h" in messages[0][1]
    else:
        with pytest.raises(Skipped, match="no measured speed"):
            hours(settings, size, planned)


def test_hours_of_a_run_are_at_the_speed_of_its_own_iterations(tmp_path: Path, llama: Path, chat_data: Path) -> None:
    PluginManager._instance = None
    settings = read_settings(spin_config(tmp_path, llama, chat_data), 1)
    PluginManager._instance = None
    assert settings is not None
    planned = plan(settings, Lengths(np.full(1000, 100), np.full(1000, 200), held_out=0, scale=1.0), 200.0)
    stages = {"generate": {"seconds": 10.0, "tokens": 1000}, "train": {"seconds": 10.0, "tokens": 500}}
    settings.lowered.run.root.mkdir()
    settings.lowered.run.write_state(RunState(settings.lowered.config, [{"stages": stages}]))
    tokens = [sum(getattr(one, name) for one in planned) for name in ("generated", "trained")]
    assert hours(settings, ModelSize(1, 0, 0, 1), planned) == pytest.approx((tokens[0] / 100 + tokens[1] / 50) / 3600)
