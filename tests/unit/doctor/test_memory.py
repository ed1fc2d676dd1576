"""Estimated memory: the guide's table, and a real model's and optimizer's bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from spin_plugin.config.specs import TrainingSpec
from spin_plugin.doctor.memory import ModelSize, Sharing, generation_bytes, training_bytes
from spin_plugin.training.precision import offloads

BILLION = 10**9
MODEL = ModelSize(BILLION, 10**8, 0, 65_536)


def training(**changes: Any) -> TrainingSpec:
    options: dict[str, Any] = {
        "dtype": "bfloat16", "fp16_key": "fp16", "adapter": False, "adapter_in_model_dtype": False,
        "optimizer": "adamw_torch", "optim_args": {}, "deepspeed": None, "fsdp": False, "empty_on_other_ranks": False,
        "micro_batch_size": 1, "gradient_accumulation_steps": 1, "world_size": 1, "num_epochs": 1.0, "max_steps": None,
        "learning_rate": 1e-6, "checkpoints": 1, "saves_optimizer": True, "loss_watchdog": False,
    }  # fmt: skip
    return TrainingSpec(**options | changes)


@pytest.mark.parametrize(
    ("sharing", "optimizer", "masters", "expected"),
    [  # bytes per trained parameter, as in docs/guide.md, "Precision and memory"
        (Sharing(), "adamw_torch", True, 18),
        (Sharing(8), "adamw_torch", True, 22),
        (Sharing(), "rmsprop", True, 14),
        (Sharing(8), "rmsprop", True, 18),
        (Sharing(8, fsdp=True), "adamw_torch", True, 16 / 8 + 2),
        (Sharing(8, fsdp=True), "rmsprop", True, 12 / 8 + 2),
        (Sharing(8, zero_stage=3), "adamw_torch", True, 16 / 8),
        (Sharing(8, zero_stage=3), "rmsprop", True, 12 / 8),
        (Sharing(8, zero_stage=2), "adamw_torch", True, 14 / 8 + 2),
        (Sharing(8, zero_stage=1), "adamw_torch", True, 12 / 8 + 4),
        (Sharing(), "adamw_torch_8bit", False, 6),
        (Sharing(8), "adamw_torch_8bit", False, 8),
        (Sharing(), "optimi_adamw", False, 10),
        (Sharing(), "sgd", True, 10),
    ],
)
def test_bytes_per_trained_parameter(sharing: Sharing, optimizer: str, masters: bool, expected: float) -> None:
    found = training_bytes(MODEL, training(optimizer=optimizer), sharing, masters=masters)
    assert found == pytest.approx(expected * BILLION)


def test_momentum_of_sgd_is_only_what_optim_args_sets() -> None:
    for momentum, expected in (("0.9", 14), ("0", 10)):
        sgd = training(optimizer="sgd", optim_args={"momentum": momentum})
        assert training_bytes(MODEL, sgd, Sharing(), masters=True) == expected * BILLION


def test_ddp_holds_a_second_copy_of_the_gradients_by_default() -> None:
    """What the estimate assumes of accelerate, which passes transformers' arguments on to torch."""
    from accelerate.utils import DistributedDataParallelKwargs

    assert not DistributedDataParallelKwargs().gradient_as_bucket_view


@pytest.mark.parametrize(
    ("zero", "offloaded"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, True),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, True),
        ({"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"pin_memory": True}}, False),
        ({"stage": 2}, False),
    ],
)
def test_offloading_is_what_deepspeed_s_configuration_says(
    tmp_path: Path, zero: dict[str, Any], offloaded: bool
) -> None:
    file = tmp_path / "without-offload.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    assert offloads(training(deepspeed={"zero_optimization": zero})) is offloaded
    assert offloads(training(deepspeed=str(file))) is offloaded
    assert not offloads(training())


SHAPES: dict[str, tuple[str, dict[str, Any], Sharing, str]] = {
    "spin-full-80gb.yml": (
        "qwen2",  # Qwen2.5 1.5B
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
         "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
        Sharing(), "adamw_torch_fused",
    ),
    "spin-fsdp2-8x80gb.yml": (
        "qwen3",  # Qwen3 8B
        {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False},
        Sharing(8, fsdp=True), "adamw_torch_fused",
    ),
    "spin-zephyr.yml": (
        "mistral",
        {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32_000},
        Sharing(8, zero_stage=3), "rmsprop",
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", SHAPES)
def test_recipe_s_header_states_this_estimate(recipe: str) -> None:
    architecture, shape, sharing, optimizer = SHAPES[recipe]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape))
    size = ModelSize(model.num_parameters(), 0, 0, 1)
    found = training_bytes(size, training(optimizer=optimizer), sharing, masters=True)
    opening = (ROOT / "yaml_examples" / recipe).read_text().partition("base_model:")[0]
    assert f"{size.parameters / 1e9:.2f}B parameters" in opening
    assert f"{found / 1e9:.0f} GB" in opening


def test_training_in_32_bits_is_what_torch_allocates() -> None:
    """Weights, gradients and AdamW's moments of a real model after a step."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).float()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    tensors = [tensor for one in model.parameters() for tensor in (one, one.grad)]
    tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    size = ModelSize(model.num_parameters(), 0, 0, 1)
    found = training_bytes(size, training(dtype="float32"), Sharing(bits=32), masters=False)
    assert found == sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize(
    ("sharing", "frozen"),
    [
        (Sharing(bits=16), 2.0),
        (Sharing(8, zero_stage=3), 2 / 8),
        (Sharing(bits=4), 0.9 * 0.5 + 0.1 * 4),  # the recipe's estimate: embeddings stay in fp32
        (Sharing(bits=8), 0.9 + 0.1 * 4),
    ],
)
def test_adapter_takes_16_bytes_a_parameter_beside_the_frozen_model(sharing: Sharing, frozen: float) -> None:
    size = MODEL._replace(adapter=10**7)
    found = training_bytes(size, training(adapter=True), sharing, masters=False)
    assert found == pytest.approx(frozen * BILLION + 16 * 10**7)


def test_adapter_under_ddp_has_its_gradients_twice() -> None:
    size = MODEL._replace(adapter=10**7)
    found = training_bytes(size, training(adapter=True), Sharing(8), masters=False)
    assert found == 2 * BILLION + 20 * 10**7


def test_generation_counts_sequences_beside_the_weights() -> None:
    """Llama 3.1 8B's cache: 128 KiB a token in 16 bits; two GPUs hold half of weights and cache each."""
    size = ModelSize(8 * BILLION, 0, 0, 2 * 32 * 8 * 128)
    one, two = generation_bytes(size, 2, 1), generation_bytes(size, 2, 2)
    assert one.per_token == 2 * two.per_token == 131_072
    assert one.weights == 2 * two.weights == 16 * BILLION
    assert one.sequences(16.5e9, 2048) == 1  # 0.27 GB each
    assert one.sequences(16.2e9, 2048) == 0
    assert one.sequences(1e9, 2048) < 0


def test_measured_size_is_that_of_the_loaded_model(tmp_path: Path, llama: Path, chat_data: Path) -> None:
    """Parameters counted on the meta device, with and without an adapter."""
    from axolotl.integrations.base import PluginManager
    from peft import LoraConfig, get_peft_model
    from tiny import LORA, spin_config

    from spin_plugin.doctor.model import measure
    from spin_plugin.doctor.settings import read_settings

    loaded = AutoModelForCausalLM.from_pretrained(llama)
    embeddings = loaded.get_input_embeddings().weight.numel() + loaded.get_output_embeddings().weight.numel()
    adapted = get_peft_model(loaded, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for changes, adapter in (({}, 0), (LORA, adapted.get_nb_trainable_parameters()[0])):
        PluginManager._instance = None
        settings = read_settings(spin_config(tmp_path, llama, chat_data, **changes), 1)
        PluginManager._instance = None
        assert settings is not None
        size = measure(settings)
        frozen = adapted.get_nb_trainable_parameters()[1] - adapted.get_nb_trainable_parameters()[0]
        assert size == ModelSize(frozen, embeddings, adapter, 2 * 2 * 1 * 32)
