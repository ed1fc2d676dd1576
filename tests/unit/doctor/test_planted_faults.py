"""`axolotl spin doctor` finds each planted fault, and nothing in a healthy configuration."""

import itertools
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from axolotl.integrations.base import PluginManager
from click.testing import CliRunner
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SMALL, byte_tokenizer, chat_rows, spin_config, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from spin_plugin.args import SpinArgs
from spin_plugin.cli import spin as commands
from spin_plugin.doctor.checkup import Checkup, Result, Skipped, Verdict
from spin_plugin.doctor.disk import whole_run
from spin_plugin.doctor.examine import examine
from spin_plugin.doctor.machine import Device
from spin_plugin.run.directory import RunDir
from spin_plugin.run.disk import Space
from spin_plugin.run.keep import mark_removed
from spin_plugin.run.state import RunState

Results = list[Result]
Examine = Callable[..., Results]
# A fault of its own, found in every one of these runs, so that vLLM is not imported for each.
NO_VLLM = {"generation": {"vllm_python": "/nowhere/python"}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", chat_rows(80))


@pytest.fixture
def found(tmp_path: Path, llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Examine]:
    """Examine the tiny configuration with changes; returns the results but that vLLM is missing."""

    def run(model: Path = llama, data: Path = rows, spin: dict[str, Any] | None = None, **changes: Any) -> Results:
        spin = {"iterations": 2} | NO_VLLM | (spin or {})
        config = spin_config(tmp_path, model, data, spin=spin, learning_rate=1e-6)
        return examined({key: value for key, value in (config | changes).items() if value is not None})

    yield run
    PluginManager._instance = None


def examined(config: dict[str, Any]) -> Results:
    PluginManager._instance = None
    results: Results = []
    examine(config, None, results.append)
    missing = [one for one in results if "/nowhere/python is not an executable file" in one.message]
    assert [one.verdict for one in missing] == [Verdict.FAULT]
    return [one for one in results if one not in missing]


def serious(results: Results, verdict: Verdict = Verdict.FAULT) -> list[str]:
    return [one.message for one in results if one.verdict is verdict]


def test_healthy_configuration(found: Examine, tmp_path: Path) -> None:
    """Everything is checked, nothing is wrong, and nothing is left behind."""
    results = found(spin={"judge": {"function": "exact"}})
    assert serious(results) == serious(results, Verdict.WARNING) == []
    assert {one.check for one in results} == {
        "packages", "devices", "configuration", "output_dir", "engines", "judge", "weights", "model", "memory",
        "tokenizer", "data", "lengths", "disk", "schedule", "hours",
    }  # fmt: skip
    assert [one.check for one in results if one.verdict is Verdict.SKIPPED] == ["hours"]
    assert list(tmp_path.iterdir()) == []


def test_keys_of_other_plugins_are_known(found: Examine) -> None:
    plugins = ["spin_plugin.SpinPlugin", "axolotl.integrations.lm_eval.LMEvalPlugin"]
    assert serious(found(plugins=plugins, lm_eval_tasks=["arc_easy"]), Verdict.WARNING) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spin": {"betta": 0.2}}, ("spin.betta", "did you mean `beta`?")),
        ({"spin": {"schedule": [{}]}}, ("schedule has 1 entries for 2 iterations",)),
        ({"spin": {"judge": {"function": "nowhere:score"}}}, ("nowhere",)),
        ({"spin": {"generation": NO_VLLM["generation"] | {"max_tokens": 5}}}, ("max_tokens: 5", "100%")),
        ({"sequence_len": 16}, ("no example fits in sequence_len (16)",)),
        ({"rl": "dpo"}, ("rl: dpo",)),
        ({"rl": None}, ("`rl: spin` is missing",)),
        ({"vllm": {"tensor_paralel_size": 2}}, ("vllm.tensor_paralel_size", "`tensor_parallel_size`")),
        ({"learning_rate": "fast"}, ("learning_rate",)),
        ({"datasets": [{"path": "./nowhere.jsonl", "type": "chat_template"}]}, ("./nowhere.jsonl does not exist",)),
        ({"neftune_noise_alpha": 5}, ("neftune_noise_alpha",)),
        ({"bf16": False, "fp16": True}, ("fp16", "rounds small updates away")),
    ],
)
def test_fault_of_the_configuration(found: Examine, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    faults = serious(found(**changes))
    assert len(faults) == 1, faults
    assert all(word in faults[0] for word in words), faults


def test_all_faults_of_a_configuration_are_found_at_once(found: Examine, tmp_path: Path, llama: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"damaged")
    faults = serious(
        found(
            model,
            spin={"betta": 1, "iterations": 0},
            vllm={"nothing": 1},
            use_pose=True,
            trl={"beta": 1},
            num_epochs="x",
        )
    )
    for word in ("spin.betta", "spin.iterations", "vllm.nothing", "use_pose", "trl", "model.safetensors", "num_epochs"):
        assert any(word in fault for fault in faults), (word, faults)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-3}, ("learning_rate: 0.001 is high",)),
        ({"warmup_steps": 500}, ("steps of the iteration are warm-up",)),
        ({"sequence_lenn": 64}, ("sequence_lenn: unknown to Axolotl", "`sequence_len`")),
        ({"sequence_lenn": 64, "rl_beta": 0.2}, ("sequence_lenn: unknown to Axolotl",)),
        ({"vllm": {"max_model_len": 30}}, ("vllm.max_model_len: 100% of prompts",)),
    ],
)
def test_unusual_setting_is_a_warning(found: Examine, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    results = found(**changes)
    assert serious(results) == []
    warnings = serious(results, Verdict.WARNING)
    assert any(all(word in warning for word in words) for warning in warnings), warnings


def test_empty_dataset(found: Examine, tmp_path: Path) -> None:
    (fault,) = serious(found(data=write_jsonl(tmp_path / "empty.jsonl", [])))
    assert "empty.jsonl" in fault


def test_real_responses_without_an_end_token(found: Examine, tmp_path: Path) -> None:
    answers = [
        {"segments": [{"label": False, "text": f"q{n} "}, {"label": True, "text": f"answer {n}"}]} for n in range(40)
    ]
    data = write_jsonl(tmp_path / "segments.jsonl", answers)
    datasets = [{"path": str(data), "ds_type": "json", "type": "input_output"}]
    (fault,) = serious(found(datasets=datasets, chat_template=None, eot_tokens=None))
    assert "generation would not stop" in fault


def test_tokenizer_without_eos(found: Examine, tmp_path: Path, llama: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert any("no eos token" in one.message for one in found(model))


def damaged(directory: Path, llama: Path, damage: str) -> Path:
    """Copy a model and damage its weights."""
    model = shutil.copytree(llama, directory / "model")
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "index":
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys((*tensors, "model.layers.7.mlp.up_proj.weight"), weights.name)})
        )
    else:
        broken = tensors.pop(name)
        save_file(tensors | ({name: broken * torch.nan} if damage == "NaN" else {}), weights, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", "model.safetensors is truncated"),
        ("index", "lacks the tensor model.layers.7.mlp.up_proj.weight"),
        ("NaN", "model.layers.1.mlp.up_proj.weight holds NaN"),
        ("missing", "model.layers.1.mlp.up_proj.weight first"),
    ],
)
def test_damaged_weights(found: Examine, tmp_path: Path, llama: Path, damage: str, words: str) -> None:
    (fault,) = serious(found(damaged(tmp_path, llama, damage)))
    assert words in fault


def huge_model(directory: Path, size: int) -> Path:
    """Write a model of at least `size` bytes that takes no space: sparse files with the right headers."""
    wide = {"hidden_size": 8192, "intermediate_size": 49152}  # 4.8 GB per layer in fp32
    layers = 1 + size // (4 * 3 * 8192 * 49152)
    config = AutoConfig.for_model("llama", **SMALL | wide | {"num_hidden_layers": layers})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    names = {name: f"model-{name.split('.')[2] if '.layers.' in name else layers}.safetensors" for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for file in sorted(set(names.values())):
        own = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        write_sparse(directory / file, {name: list(tensor.shape) for name, tensor in own.items()})
    return directory


def write_sparse(file: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of zeros that occupy no disk space."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(content)) + content)
        opened.truncate(8 + len(content) + end)


def test_model_too_large_for_memory_and_disk(found: Examine, tmp_path: Path) -> None:
    size = max(shutil.disk_usage(tmp_path).free, psutil.virtual_memory().total)
    training, generation, disk = serious(found(huge_model(tmp_path / "huge", size)))
    assert training.startswith("training: ")
    assert generation.startswith("generation: ")
    assert disk.startswith("output_dir: ")


def test_larger_training_than_memory_is_only_a_matter_of_the_device(
    found: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model on GPUs of different size: too small, nearly full, large enough."""
    verdicts = []
    for memory in (1_000_000, 1_900_000, 80_000_000_000):
        device = Device("GPU", memory, gpu=True)
        monkeypatch.setattr("spin_plugin.doctor.model.devices", lambda device=device: [device])
        results = found()
        verdicts.append([one.verdict for one in results if one.message.startswith("training: ")])
    assert verdicts == [[Verdict.FAULT], [Verdict.WARNING, Verdict.OK], [Verdict.OK]]


def test_output_dir_of_another_configuration(found: Examine, tmp_path: Path, llama: Path, rows: Path) -> None:
    run = RunDir(tmp_path / "run")
    shard = run.iteration(0).synthetic / "shard-00000.jsonl"
    shard.parent.mkdir(parents=True)
    shard.write_text("generated\n")
    run.write_state(RunState(spin_config(tmp_path, llama, rows, learning_rate=5e-4)))
    (fault, *_) = serious(found())
    assert "another configuration" in fault
    assert "learning_rate" in fault


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of a run with one of two iterations finished."""
    shutil.copytree(ROOT / "tests/data/run-0.2", tmp_path / "frozen", symlinks=True)
    monkeypatch.chdir(tmp_path / "frozen")
    return yaml.safe_load(Path("config.yml").read_text())


def test_run_in_progress_is_examined_and_left_as_it_is(frozen: dict[str, Any]) -> None:
    frozen["spin"]["generation"]["vllm_python"] = "/nowhere/python"
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    results: Results = []
    PluginManager._instance = None
    numbers = examine(frozen, None, results.append)
    assert any("1 of 2 iterations are finished" in one.message for one in results)
    assert numbers["pair"].keys() == {"prompt", "real", "synthetic"}
    assert numbers["pair"]["real"]["text"].endswith("<|im_end|>")
    assert [side["trained"] for side in numbers["pair"].values()] == [False, True, True]
    assert [one["steps"] for one in numbers["schedule"]] == [2, 4]
    assert any(one.message.startswith("4 steps of") for one in results), "of the iteration that is left"
    assert numbers["iteration"] == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_missing_examples_of_a_run_are_not_written(frozen: dict[str, Any]) -> None:
    frozen["spin"]["generation"]["vllm_python"] = "/nowhere/python"
    (real,) = Path().rglob("real")
    shutil.rmtree(real)
    results: Results = []
    PluginManager._instance = None
    examine(frozen, None, results.append)
    assert any("training will tokenize the data again" in one for one in serious(results, Verdict.WARNING))
    assert not real.exists()


RECIPES = [path for path in sorted((ROOT / "yaml_examples").glob("spin-*.yml")) if path.name != "spin-tiny.yml"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_with_a_model_out_of_reach_is_skipped(
    recipe: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml_examples").symlink_to(ROOT / "yaml_examples")
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(recipe.read_text())
    if adapter := config.get("lora_model_dir"):
        kind = LoraConfig(r=config["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), kind).save_pretrained(adapter)
    config["spin"]["generation"] = NO_VLLM["generation"]
    results = examined(config)
    assert serious(results) == []
    skipped = {one.check: one.message for one in results if one.verdict is Verdict.SKIPPED}
    assert "needs the tokenizer" in skipped.pop("data")
    assert skipped.keys() == {"weights", "model", "tokenizer"}
    assert all("hub cannot be reached" in reason for reason in skipped.values())


def test_dataset_out_of_reach_is_skipped(found: Examine) -> None:
    results = found(datasets=[{"path": "nobody/nothing", "type": "chat_template"}])
    assert serious(results) == []
    (skipped,) = serious(results, Verdict.SKIPPED)
    assert "nobody/nothing: not in the cache" in skipped


def test_large_dataset_is_sampled(found: Examine, monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    """A quarter of the rows is looked at, and prompts and steps are those of all rows."""
    from spin_plugin.doctor import data

    (whole,) = [one.message for one in found() if "steps of" in one.message]
    monkeypatch.setattr(data, "SAMPLE", rows.stat().st_size // 4 + 1)
    results = found(spin={"held_out": 0}, test_datasets=None)
    assert any("a sample: 1 of 4 rows" in one.message for one in results)
    assert any("20 prompts from 20 rows" in one.message for one in results)
    assert any(one.message.startswith("60 steps of 4 pairs") for one in results), whole


def test_number_of_held_out_rows_is_sampled(found: Examine, monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    """`val_set_size` may be a number of rows, more than the sample has."""
    from spin_plugin.doctor import data

    monkeypatch.setattr(data, "SAMPLE", rows.stat().st_size // 4 + 1)
    results = found(val_set_size=40)
    assert serious(results) == []
    assert any("a sample: 1 of 4 rows" in one.message for one in results)
    assert any("10 prompts from 10 rows" in one.message for one in results)
    (steps,) = [one.message for one in results if "steps of" in one.message]
    assert steps.startswith("30 steps of 4 pairs"), "40 of 80 rows, once and twice"


def test_tokenizer_with_other_added_tokens_is_written_elsewhere(found: Examine, tmp_path: Path) -> None:
    token = byte_tokenizer().convert_tokens_to_ids("<unk>")
    results = found(added_tokens_overrides={token: "<|other|>"})
    assert "tokenizer" in {one.check for one in results if one.verdict is Verdict.OK}, serious(results)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", ["all", "best", "last"])
@pytest.mark.parametrize("judged", [False, True])
def test_disk_suffices_for_what_a_run_keeps(keep: str, judged: bool) -> None:
    """Runs in which any iteration is best, or made the model worse, never take more than was announced."""
    judge = {"judge": {"function": "exact"}} if judged else {}
    spin = SpinArgs.model_validate({"iterations": 5, "keep": keep, **judge})
    space, most = Space(minimum=0, expected=1000, finished=700, data=10), 0
    for changes in itertools.product([-0.1, 0.1], repeat=4):
        finished: list[dict[str, Any]] = []
        for number, change in enumerate(changes):
            check = {"prompts": 40, "before": -1.0, "after": -1 + change, "difference": change}
            check["interval"] = [change - 0.01, change + 0.01]
            finished.append({"iteration": number, "held_out": check} | ({"judge": check} if judged else {}))
            mark_removed(finished, spin)
            removed = [entry.get("removed", ()) for entry in finished]
            left = [10 + 90 * ("model" not in one) + 600 * ("checkpoints" not in one) for one in removed]
            most = max(most, sum(left) + space.expected)
    assert most <= whole_run(space, 90, spin, 5, measured=True) <= most + 90 * judged


def test_nothing_is_removed_without_a_measure() -> None:
    space = Space(minimum=0, expected=1000, finished=700, data=10)
    every = whole_run(space, 90, SpinArgs(iterations=5), 5, measured=True)
    assert every == 4 * 700 + 1000
    assert whole_run(space, 90, SpinArgs(iterations=5, keep="best"), 5, measured=False) == every
    assert whole_run(space, 90, SpinArgs(iterations=5, keep="last"), 1, measured=False) == 1000


def test_disk_counts_the_checkpoints_that_stay(found: Examine, llama: Path) -> None:
    """Two fp32 iterations: models, and four checkpoints with AdamW's moments of the one, five while the other runs."""
    (line,) = [one.message for one in found(save_total_limit=4) if one.check == "disk"]
    size = sum(file.stat().st_size for file in llama.glob("*.safetensors"))
    amount, unit, rest = line.split(" ", 2)
    assert float(amount) * {"kB": 1e3, "MB": 1e6}[unit] >= (2 + 9 * 3) * size
    assert rest.startswith("at most for 2 iterations (spin.keep: all)")
    (line,) = [one.message for one in found(spin={"iterations": 1}) if one.check == "disk"]
    assert "for 1 iteration (" in line


def test_command_shows_what_its_process_finds(tmp_path: Path, llama: Path, rows: Path) -> None:
    """The command and its process, which must agree on what they say to each other."""
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(spin_config(tmp_path, llama, rows, spin={"iterations": -3} | NO_VLLM)))
    done = CliRunner().invoke(commands, ["doctor", str(file)])
    assert done.exit_code == 1, done.output
    assert "✗ configuration" in done.output
    assert "spin.iterations" in done.output
    assert "2 wrong" in done.output


@pytest.mark.parametrize("size", [1, 1_000_000])  # a pipe holds 64 KiB: it is broken while more is being written
def test_process_that_reports_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    file = tmp_path / "config.yml"
    file.write_text(f"rl: spin\nspin: {{iterations: 1}}\nwandb_name: {'n' * size}\n")
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    done = CliRunner().invoke(commands, ["doctor", str(file)])
    assert done.exit_code == 1
    assert "reported no check" in done.output
    assert "0 wrong" not in done.output


def test_checkup_goes_on_after_a_library_s_error_but_not_after_a_bug() -> None:
    results: Results = []
    checkup = Checkup(results.append)

    def fail(error: Exception) -> None:
        raise error

    assert checkup.run("a", fail, Skipped("no network")) is None
    assert checkup.run("b", fail, KeyError("metadata")) is None
    assert results == [
        Result("a", Verdict.SKIPPED, "no network"), Result("b", Verdict.FAULT, "KeyError: 'metadata'")
    ]  # fmt: skip
    with pytest.raises(AssertionError):
        checkup.run("c", fail, AssertionError())
