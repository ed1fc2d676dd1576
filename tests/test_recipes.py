"""Every YAML of yaml_examples/: found by glob, lowered and validated by Axolotl, and played with a tiny model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Finished
from tiny import chat_rows, make_model, write_config, write_jsonl

from spin_plugin.lowering import lower

RECIPES = sorted((ROOT / "yaml_examples").glob("*.yml"))
SPIN_RECIPES = [path for path in RECIPES if yaml.safe_load(path.read_text()).get("rl") == "spin"]
# What such a GPU machine has; the validators ask for it.
GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


@pytest.fixture
def registered() -> Iterator[None]:
    from axolotl.integrations.base import PluginManager

    PluginManager._instance = None
    PluginManager.get_instance().register("spin_plugin.SpinPlugin")
    yield
    PluginManager._instance = None


def test_there_are_recipes() -> None:
    names = {path.name for path in SPIN_RECIPES}
    assert {"spin-tiny.yml", "spin-zephyr.yml", "spin-llama-8b-lora.yml", "spin-llama-8b-fsdp2.yml"} <= names
    assert {"spin-qwen3-4b-qlora.yml", "spin-multi-turn.yml", "spin-from-sft.yml"} <= names


@pytest.mark.parametrize("path", SPIN_RECIPES, ids=lambda path: path.name)
def test_recipe_says_what_it_is_for(path: Path) -> None:
    """Which machine, and how long."""
    opening = path.read_text().partition("base_model:")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert "machine" in opening.lower()


@pytest.mark.parametrize("path", SPIN_RECIPES, ids=lambda path: path.name)
def test_recipe_is_lowered_and_valid(
    path: Path, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    monkeypatch.chdir(ROOT)
    cfg = DictDefault(yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path)})
    for dataset in cfg["datasets"]:  # quickstart.sh makes the tiny data
        if dataset["path"].startswith("outputs/"):
            dataset["path"] = str(write_jsonl(tmp_path / "data.jsonl", chat_rows(2)))
    lower(cfg, AxolotlInputConfig.model_fields)
    valid = validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})
    assert valid.spin_iteration == 0
    assert valid.spin["iterations"] == yaml.safe_load(path.read_text())["spin"]["iterations"]
    assert valid.rl is None


def test_tiny_recipe_is_the_sft_recipe_plus_the_three_additions() -> None:
    sft, spin = (yaml.safe_load((ROOT / "yaml_examples" / f"{name}-tiny.yml").read_text()) for name in ("sft", "spin"))
    own = {"base_model", "output_dir", "plugins", "rl", "spin", "learning_rate", "num_epochs", "save_strategy",
           "save_total_limit", "dataset_prepared_path"}  # fmt: skip
    assert {key: value for key, value in sft.items() if key not in own} == {
        key: value for key, value in spin.items() if key not in own
    }


def scaled_down(recipe: dict[str, Any], folder: Path, model: Path, data: Path) -> dict[str, Any]:
    """A recipe's own keys on a CPU: another model, other data and lengths, no GPU-only formats."""
    cpu = {
        "dataset_num_proc": 1,
        "bf16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "micro_batch_size": 4,
        "sequence_len": 192,
    }
    recipe |= cpu | {"base_model": str(model), "output_dir": str(folder / "run")}
    recipe.pop("revision_of_model", None)
    recipe.pop("deepspeed", None)  # ZeRO-3 on a CPU is not what `axolotl train` can start
    dataset = recipe["datasets"][0] | {"path": str(data), "ds_type": "json"}
    recipe["datasets"] = [{key: value for key, value in dataset.items() if key != "split"}]
    recipe["chat_template"] = "chatml"
    recipe["eot_tokens"] = ["<|im_end|>"]
    recipe["spin"]["num_prompts"] = 12
    generation = {"max_tokens": 12, "vllm": {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}}
    recipe["spin"]["generation"] = recipe["spin"].get("generation", {}) | generation
    return recipe


@pytest.mark.slow
def test_zephyr_recipe_plays_two_iterations_on_a_tiny_mistral(tmp_path: Path, command: Callable[..., Finished]) -> None:
    model = make_model(tmp_path / "mistral", "mistral")
    data = write_jsonl(tmp_path / "chat.jsonl", chat_rows(16, turns=2))
    recipe = yaml.safe_load((ROOT / "yaml_examples/spin-zephyr.yml").read_text())
    config = write_config(tmp_path, scaled_down(recipe, tmp_path, model, data))
    done = command(ROOT / "scripts/iterate.sh", config, "2", folder=tmp_path)
    assert done.code == 0, done.output[-3000:]
    second = yaml.safe_load((tmp_path / "run/iteration-1/config.yml").read_text())
    assert second["learning_rate"] == 5e-7
    assert second["optimizer"] == "rmsprop"
    assert "12 pairs from 12" in done.output, "first turns only, 12 of them"
