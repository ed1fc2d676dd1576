"""Every YAML of yaml_examples/: found by glob, lowered and validated by Axolotl, and played with a tiny model.

The tiny recipe is played by test_quickstart.py, all others here: two iterations with their own keys, on a random model
of the same architecture; those for several GPUs on two processes, ZeRO-3 and FSDP2 as the recipe says. What a CPU
cannot is in `ON_CPU`; what lies below the `axolotl` command is in several_processes.py.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GPU, ROOT
from tiny import byte_tokenizer, chat_rows, make_model, write_config, write_jsonl

from spin_plugin.iteration import open_pairs
from spin_plugin.lowering import lower
from spin_plugin.run import RunDir

RECIPES = sorted((ROOT / "yaml_examples").glob("*.yml"))
SPIN_RECIPES = [path for path in RECIPES if yaml.safe_load(path.read_text()).get("rl") == "spin"]


def test_there_are_recipes() -> None:
    names = {path.name for path in SPIN_RECIPES}
    assert {"spin-tiny.yml", "spin-zephyr.yml", "spin-llama-8b-lora.yml", "spin-llama-8b-fsdp2.yml"} <= names
    assert {"spin-qwen3-4b-qlora.yml", "spin-multi-turn.yml", "spin-from-sft.yml"} <= names


@pytest.mark.parametrize("path", SPIN_RECIPES, ids=lambda path: path.name)
def test_recipe_says_what_it_is_for(path: Path) -> None:
    """Which machine, how much memory, and how long."""
    opening = path.read_text().partition("base_model:")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert "Machine: " in opening
    assert re.search(r"\d GB", opening)
    assert re.search(r"Expected[^.]*(hour|minute|epoch)", opening)


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


# Architecture and number of processes.
PLAYED = {
    "spin-zephyr.yml": ("mistral", 2),
    "spin-llama-8b-lora.yml": ("llama", 1),
    "spin-llama-8b-fsdp2.yml": ("llama", 2),
    "spin-qwen3-4b-qlora.yml": ("qwen3", 1),
    "spin-multi-turn.yml": ("qwen2", 1),
    "spin-from-sft.yml": ("qwen2", 1),
}
ON_CPU = {
    "bf16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "dataset_num_proc": 1,
    "sequence_len": 192,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
}


def scaled_down(name: str, folder: Path) -> dict[str, Any]:
    """A recipe's own keys with another model, other data and lengths, and no GPU-only formats."""
    recipe = yaml.safe_load((ROOT / "yaml_examples" / name).read_text())
    recipe |= ON_CPU | {"output_dir": str(folder / "run")}
    # bitsandbytes 0.50 packs 4-bit weights on a CPU in blocks of 64
    recipe["base_model"] = str(make_model(folder / "model", PLAYED[name][0], intermediate_size=128))
    recipe.pop("revision_of_model", None)
    (dataset,) = recipe["datasets"]
    dataset.pop("split", None)
    dataset |= {"path": str(folder / "data.jsonl"), "ds_type": "json"}
    if dataset["type"] == "alpaca":
        rows = [{"instruction": f"count {n}", "input": "", "output": f"{n}, {n + 1}"} for n in range(16)]
    else:
        rows = chat_rows(16, turns=2)
        recipe |= {"chat_template": "chatml", "eot_tokens": ["<|im_end|>"]}
    write_jsonl(folder / "data.jsonl", rows)
    if "deepspeed" in recipe:
        recipe["deepspeed"] = json.loads((ROOT / recipe["deepspeed"]).read_text()) | {"bf16": {"enabled": False}}
    recipe["spin"]["num_prompts"] = 12
    generation = {"max_tokens": 12, "vllm_kwargs": {"kv_cache_memory_bytes": 64 << 20}}
    recipe["spin"]["generation"] = recipe["spin"].get("generation", {}) | generation
    return recipe


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, play: Callable[..., None]) -> Path:
    """A folder with the run of each recipe."""
    folder, jobs = tmp_path_factory.mktemp("recipes"), []
    for name, (_, processes) in PLAYED.items():
        own = folder / name
        own.mkdir()
        jobs += 2 * [(write_config(own, scaled_down(name, own)), processes)]
    play(folder, jobs)
    return folder


def test_every_recipe_is_played() -> None:
    assert {path.name for path in SPIN_RECIPES} == {*PLAYED, "spin-tiny.yml"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYED)
def test_recipe_plays_two_iterations(played: Path, name: str) -> None:
    """With its own keys, the first loss of both ln 2: the policy is the opponent."""
    recipe = yaml.safe_load((ROOT / "yaml_examples" / name).read_text())
    run = RunDir(played / name / "run")
    assert run.finished() == 2
    for number in (0, 1):
        first = run.iteration(number).logged()[0]
        assert first["spin/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["spin/reward_margin"] == pytest.approx(0, abs=1e-5)
        resolved = yaml.safe_load(run.iteration(number).config.read_text())
        assert resolved["optimizer"] == recipe["optimizer"]
        schedule = recipe["spin"].get("schedule") or [{}, {}]
        assert float(resolved["learning_rate"]) == float(schedule[number].get("learning_rate", recipe["learning_rate"]))
        pairs = open_pairs(run.iteration(number)).train
        assert len({(pair["example"], pair["iteration"]) for pair in pairs}) == 12 * (number + 1)


@pytest.mark.slow
def test_turns_of_the_recipes(played: Path) -> None:
    """The paper's first turns alone have no answer before them, all turns do."""
    end = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    answers = {
        name: {list(pair["prompt"]).count(end) for pair in open_pairs(RunDir(played / name / "run").iteration(0)).train}
        for name in ("spin-zephyr.yml", "spin-multi-turn.yml")
    }
    assert answers == {"spin-zephyr.yml": {1}, "spin-multi-turn.yml": {1, 3}}
