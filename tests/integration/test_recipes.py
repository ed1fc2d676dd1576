"""Every YAML of yaml_examples/ is lowered and validated by Axolotl, and run with a tiny model.

test_quickstart.py runs the tiny recipe. All others run here with their own keys, on a random model of the same
architecture at the recipe's model path, and on data with UltraChat's files and columns. Multi-GPU recipes run on two
processes with their ZeRO-3 or FSDP2 settings. `ON_CPU` replaces settings that need a GPU; several_processes.py replaces
the `axolotl` command.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.integrations.base import PluginManager
from click.testing import CliRunner
from conftest import GPU, ROOT
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, chat_rows, make_model, write_config, write_jsonl
from transformers import AutoModelForCausalLM

from spin_plugin.args import SpinArgs
from spin_plugin.cli.init import init
from spin_plugin.config.specs import read_data
from spin_plugin.run.directory import RunDir
from spin_plugin.training.loading import AxolotlSource
from spin_plugin.training.prepare import open_pairs

EXAMPLES = ROOT / "yaml_examples"
RECIPES = sorted(EXAMPLES.glob("*.yml"))


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text())


SPIN = [path.name for path in RECIPES if recipe(path.name).get("rl") == "spin"]
SFT = [path.name for path in RECIPES if path.name not in SPIN]
PAIRS = {name: name.replace("sft-", "spin-") for name in SFT if name != "sft-tiny.yml"}


def test_there_are_recipes() -> None:
    assert len(SPIN) > 4
    assert len(PAIRS) > 2
    assert {*PAIRS.values()} <= {*SPIN}


@pytest.mark.parametrize("name", [*SPIN, *PAIRS])
def test_recipe_header_is_complete(name: str) -> None:
    """It states the machine, its memory, and the command."""
    opening = (EXAMPLES / name).read_text().partition("base_model:")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert re.search(r"Hardware: .*\d GB", opening)
    if name != "spin-tiny.yml":
        assert f"train yaml_examples/{name}" in opening


def validated(config: dict[str, Any]) -> Any:
    """Load plugins and validate a configuration like Axolotl on a machine with eight GPUs."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(config)
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files that recipes reference, and no plugin loaded."""
    (tmp_path / "yaml_examples").symlink_to(EXAMPLES)
    (tmp_path / "outputs/tiny/data").mkdir(parents=True)
    write_jsonl(tmp_path / "outputs/tiny/data/sft.jsonl", chat_rows(2))  # normally created by quickstart.sh
    monkeypatch.chdir(tmp_path)
    PluginManager._instance = None
    yield tmp_path
    PluginManager._instance = None


@pytest.mark.parametrize("name", SPIN)
def test_recipe_is_lowered_and_valid(name: str, directory: Path) -> None:
    place_models(recipe(name), directory)
    valid = validated(recipe(name))
    assert valid.spin_iteration == 0
    assert valid.spin["iterations"] == recipe(name)["spin"]["iterations"]
    assert valid.rl is None


@pytest.mark.parametrize("name", SFT)
def test_sft_recipe_is_valid(name: str, directory: Path) -> None:
    assert validated(recipe(name)).output_dir == recipe(name)["output_dir"]


@pytest.mark.parametrize("name", PAIRS)
def test_init_turns_the_sft_recipe_into_the_spin_recipe(name: str, directory: Path) -> None:
    """Except for SPIN's own options, and `sample_packing`, which SPIN ignores."""
    made = initialized(name, directory)
    expected = recipe(PAIRS[name])
    assert float(made["learning_rate"]) == float(expected["learning_rate"])
    own = {"plugins", "spin", "sample_packing", "learning_rate"}
    assert {key: value for key, value in made.items() if key not in own} == {
        key: value for key, value in expected.items() if key not in own
    }
    place_models(made, directory)
    assert validated(made).spin_iteration == 0


def initialized(name: str, directory: Path) -> dict[str, Any]:
    """Return the output of `axolotl spin init` for an SFT recipe."""
    target = directory / "made.yml"
    done = CliRunner().invoke(init, [str(EXAMPLES / name), "--output", str(target)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return yaml.safe_load(target.read_text())


def test_tiny_recipe_is_the_sft_recipe_plus_the_three_additions() -> None:
    sft, spin = recipe("sft-tiny.yml"), recipe("spin-tiny.yml")
    own = {"base_model", "output_dir", "plugins", "rl", "spin", "vllm", "learning_rate", "num_epochs", "save_strategy",
           "save_total_limit", "dataset_prepared_path"}  # fmt: skip
    assert {key: value for key, value in sft.items() if key not in own} == {
        key: value for key, value in spin.items() if key not in own
    }


def ultrachat(directory: Path) -> Path:
    """Write a dataset with UltraChat-200k's splits, files and columns; 200 two-turn conversations for training."""
    conversations = [
        {"prompt": row["messages"][0]["content"], "prompt_id": f"{number:064x}", "messages": row["messages"]}
        for number, row in enumerate(chat_rows(202, turns=2))
    ]
    (directory / "data").mkdir(parents=True)
    for split, rows in {"train_sft": conversations[:200], "test_sft": conversations[200:]}.items():
        Dataset.from_list(rows).to_parquet(directory / f"data/{split}-00000-of-00001.parquet")
    return directory


def place_models(config: dict[str, Any], directory: Path, architecture: str = "llama") -> None:
    """Save a tiny model, and an adapter, at the configuration's paths below `directory`."""
    # bitsandbytes 0.50 packs 4-bit weights on a CPU in blocks of 64
    model = make_model(directory / config["base_model"], architecture, intermediate_size=128)
    if adapter := config.get("lora_model_dir"):
        kind = LoraConfig(
            r=config["lora_r"],
            lora_alpha=config["lora_alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), kind).save_pretrained(directory / adapter)


@dataclass(frozen=True)
class Setup:
    """How to run a recipe."""

    architecture: str
    processes: int = 1
    iterations: int = 1


SETUPS = {
    "spin-zephyr.yml": Setup("mistral", processes=2, iterations=2),
    "spin-lora-24gb.yml": Setup("qwen2", iterations=2),
    "spin-qlora-16gb.yml": Setup("qwen2"),
    "spin-full-80gb.yml": Setup("qwen2"),
    "spin-fsdp2-8x80gb.yml": Setup("qwen3", processes=2),
    "sft-lora-24gb.yml": Setup("qwen2"),  # as converted by `axolotl spin init`
}
ON_CPU = {
    "bf16": False,
    "tf32": False,
    "sequence_len": 192,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
}


def scaled_down(config: dict[str, Any], data: Path) -> dict[str, Any]:
    """Return a recipe with the UltraChat-like data, fewer prompts, short lengths, and no GPU-only formats."""
    config = config | ON_CPU
    config.pop("revision_of_model", None)
    config["datasets"][0]["path"] = str(data)
    if config["chat_template"] == "tokenizer_default":  # the tiny tokenizer has none
        config |= {"chat_template": "chatml", "eot_tokens": ["<|im_end|>"]}
    if "deepspeed" in config:
        config["deepspeed"] = json.loads((ROOT / config["deepspeed"]).read_text()) | {"bf16": {"enabled": False}}
    config["spin"] |= {
        "num_prompts": 12,
        "generation": {"max_tokens": 12, "vllm_kwargs": {"kv_cache_memory_bytes": 64 << 20}},
    }
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_jobs: Callable[..., None]) -> Path:
    """A directory with one subdirectory per recipe, which contains its run."""
    directory, jobs = tmp_path_factory.mktemp("recipes"), []
    data = ultrachat(directory / "ultrachat")
    for name, setup in SETUPS.items():
        own = directory / name
        own.mkdir()
        config = scaled_down(recipe(name) if name in SPIN else initialized(name, own), data)
        place_models(config, own, setup.architecture)
        jobs += setup.iterations * [(write_config(own, config), setup.processes)]
    run_jobs(*jobs)
    return directory


def run_of(name: str, runs: Path) -> RunDir:
    config = yaml.safe_load((runs / name / "config.yml").read_text())
    return RunDir(runs / name / config["output_dir"])


def test_every_recipe_is_run() -> None:
    assert {*SPIN} - {*SETUPS} == {"spin-tiny.yml"}


def test_ultrachat_is_read_by_the_paper_recipe_s_dataset_block(directory: Path) -> None:
    """Only the dataset's path differs; the split's conversations are reduced to their first turns."""
    from axolotl.utils.config import normalize_config

    from spin_plugin.data.real import prepare_real

    config = scaled_down(recipe("spin-zephyr.yml"), ultrachat(directory / "ultrachat"))
    assert config["datasets"] == [{**recipe("spin-zephyr.yml")["datasets"][0], "path": str(directory / "ultrachat")}]
    place_models(config, directory)
    cfg = validated(config)
    normalize_config(cfg)
    spin = SpinArgs.model_validate(config["spin"] | {"held_out": 0})
    real = prepare_real(AxolotlSource(cfg), RunDir(directory / "run"), spin, read_data(cfg))
    decode = byte_tokenizer().decode
    assert {decode(row["prompt"]): decode(row["real"]) for row in real.train} == {
        f"<|im_start|>user\ncount {n}<|im_end|>\n<|im_start|>assistant\n": f"{n} comes before {n + 1}<|im_end|>"
        for n in range(200)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_recipe_runs(runs: Path, name: str) -> None:
    """With its own keys; the first loss of each iteration is ln 2, apart from the SFT term, because the policy equals
    the opponent."""
    config = yaml.safe_load((runs / name / "config.yml").read_text())
    run, iterations = run_of(name, runs), SETUPS[name].iterations
    assert run.finished() == iterations
    for number in range(iterations):
        first = run.iteration(number).read_log()[0]
        sft_term = config["spin"].get("sft_weight", 0.0) * -first["spin/logp_real_per_token"]
        assert first["spin/loss"] == pytest.approx(math.log(2) + sft_term, abs=1e-5)
        assert first["spin/reward_margin"] == pytest.approx(0, abs=1e-5)
        resolved = yaml.safe_load(run.iteration(number).config.read_text())
        assert resolved["optimizer"] == config["optimizer"]
        scheduled = config["spin"].get("schedule", [{}] * iterations)[number]
        assert float(resolved["learning_rate"]) == float(scheduled.get("learning_rate", config["learning_rate"]))
        pairs = open_pairs(run.iteration(number)).train
        assert len({(pair["example"], pair["iteration"]) for pair in pairs}) == 12 * (number + 1)


@pytest.mark.slow
def test_turns_of_the_recipes(runs: Path) -> None:
    """The paper's recipe has first turns only, without earlier answers in the prompt; the other has all turns."""
    end = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    answers = {
        name: {list(pair["prompt"]).count(end) for pair in open_pairs(run_of(name, runs).iteration(0)).train}
        for name in ("spin-zephyr.yml", "spin-lora-24gb.yml")
    }
    assert answers == {"spin-zephyr.yml": {1}, "spin-lora-24gb.yml": {1, 3}}
