"""`rl: spin` is lowered to a supervised run, or rejected with one line that names the reason."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from safetensors.torch import save_file
from tiny import spin_config

from spin_plugin import SpinPlugin
from spin_plugin.config.announce import announce
from spin_plugin.config.identity import differing_keys
from spin_plugin.config.lower import LORA_KERNELS, PLUGIN, Lowered, asks_for_spin, lower, require_base_model, restore
from spin_plugin.config.refuse import NO_PROMPT_TYPES, REFUSED, refuse_other_trainers
from spin_plugin.config.specs import read_opponent, read_training
from spin_plugin.console import SpinError
from spin_plugin.opponent.merge import merge
from spin_plugin.run.directory import RunDir
from spin_plugin.run.state import RunState

Config = Callable[..., MutableMapping[str, Any]]


@pytest.fixture(params=[dict, DictDefault], ids=["dict", "DictDefault"])
def config(request: pytest.FixtureRequest, tmp_path: Path, llama: Path, chat_data: Path) -> Config:
    """Factory of valid configurations with changes, as a dict (parsed YAML) and as Axolotl's DictDefault."""
    return lambda **changes: request.param(spin_config(tmp_path, llama, chat_data, **changes))


def error_of(cfg: MutableMapping[str, Any], known: tuple[str, ...] = ()) -> str:
    """Return the one-line message with which a configuration is rejected."""
    with pytest.raises(SpinError) as caught:
        lower(cfg, known)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def finish(cfg: Mapping[str, Any], model: Path, iterations: int = 1, *, adapter: bool = False) -> RunDir:
    """Create a run directory with finished iterations, each with a real model or adapter."""
    run = RunDir(Path(cfg["output_dir"]))
    for number in range(iterations):
        directory = run.iteration(number).path
        if adapter:
            directory.mkdir(parents=True)
            (directory / "adapter_config.json").write_text(json.dumps({"r": 4}))
            save_file({"lora_A.weight": torch.ones(4, 2)}, directory / "adapter_model.safetensors")
        else:
            shutil.copytree(model, directory)
    run.root.mkdir(exist_ok=True)
    run.write_state(
        RunState({"base_model": cfg["base_model"]}, [{"iteration": number} for number in range(iterations)], "0")
    )
    return run


# --- the lowered configuration -----------------------------------------------------------------


def test_lowered_configuration_is_supervised(config: Config, tmp_path: Path, llama: Path) -> None:
    cfg = config(sample_packing=True, eval_sample_packing=True, pad_to_sequence_len=True, train_on_inputs=True)
    before = copy.deepcopy(cfg)
    lowered = lower(cfg)
    assert "rl" not in cfg
    assert cfg["spin_iteration"] == lowered.iteration == 0
    for key in ("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "train_on_inputs"):
        assert cfg[key] is False
    for key in ("datasets", "plugins", "learning_rate", "chat_template", "output_dir"):
        assert cfg[key] == before[key]
    assert cfg["base_model"] == str(llama)
    assert lowered.run.root == tmp_path / "run"
    assert lowered.spin.iterations == 2
    assert not lowered.all_finished
    assert not (tmp_path / "run").exists(), "lowering writes nothing"


def test_users_configuration_is_kept_unchanged_without_secrets(config: Config) -> None:
    cfg = config(hf_token="hf_secret", sample_packing=True)
    plain = json.loads(json.dumps(cfg))
    lowered = lower(cfg)
    del plain["hf_token"]
    assert lowered.config == plain
    assert type(lowered.config) is type(lowered.config["spin"]["generation"]) is dict


def test_spin_block_is_complete_afterwards(config: Config) -> None:
    cfg = config(spin={"iterations": 3, "loss_type": "hinge"})
    lower(cfg)
    assert cfg["spin"]["iterations"] == 3
    assert cfg["spin"]["loss_type"] == "hinge"
    assert cfg["spin"]["beta"] == 0.1
    assert cfg["spin"]["generation"]["temperature"] == 1.0
    assert "schedule" not in cfg["spin"]


@pytest.mark.parametrize(("requested", "expected"), [(None, False), (False, False), (True, True)])
def test_last_model_is_the_next_opponent_unless_the_best_is_requested(
    config: Config, requested: bool | None, expected: bool
) -> None:
    cfg = config(load_best_model_at_end=requested)
    lower(cfg)
    assert cfg["load_best_model_at_end"] is expected


@pytest.mark.parametrize("base", ["./nowhere/sft", "/nowhere/sft", "~/nowhere/sft"])
def test_missing_base_model_is_named_before_axolotl_asks_the_hub(config: Config, base: str) -> None:
    cfg = config(base_model=base)
    with pytest.raises(SpinError, match=f"base_model: {base} does not exist; train the SFT model first"):
        require_base_model(cfg)
    for found in (config(), config(base_model="org/model"), config(base_model="model")):
        require_base_model(found)


def test_resume_key_is_removed(config: Config) -> None:
    cfg = config(resume_from_checkpoint="somewhere")
    lower(cfg)
    assert "resume_from_checkpoint" not in cfg


# --- rejected configurations -------------------------------------------------------------------


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_key_is_reported_with_the_reason(config: Config, key: str) -> None:
    assert error_of(config(**{key: "something"})) == f"{key}: cannot be used with `rl: spin`: {REFUSED[key]}"


@pytest.mark.parametrize("order", [1, -1])
def test_plugin_with_its_own_trainer_is_rejected_in_any_position(
    config: Config, order: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is generated."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    manager = PluginManager.get_instance()
    manager.plugins.clear()  # since 0.21 the installed plugin is already registered
    names = [PLUGIN, "axolotl.integrations.kd.KDPlugin"]
    for name in names[::order]:
        manager.register(name)
    ours, other = (manager.plugins[name] for name in names)
    ours.register(config())
    with pytest.raises(SystemExit):
        ours.load_datasets(DictDefault(kd_trainer=True))
    assert "plugins: KDPlugin has its own trainer or collator" in capsys.readouterr().out
    with pytest.raises(SpinError):  # Axolotl 0.19 uses the plugin's collator even if the plugin is disabled
        refuse_other_trainers(DictDefault(), [other])
    refuse_other_trainers(DictDefault(), [BasePlugin()])


def test_mamba_is_rejected(config: Config) -> None:
    assert "vLLM cannot load it" in error_of(config(model_type="MambaLMHeadModel"))
    with pytest.raises(SpinError, match="cannot batch pairs"):
        refuse_other_trainers(DictDefault(model_config_type="mamba"), [])


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_key_may_be_false(config: Config, key: str) -> None:
    lower(config(**{key: False}))


@pytest.mark.parametrize("key", ["context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"])
def test_parallelism_within_a_sequence_or_layer_is_rejected(config: Config, key: str) -> None:
    assert key in error_of(config(**{key: 2}))
    lower(config(**{key: 1}))


@pytest.mark.parametrize("adapter", ["llama-adapter", "ia3", "dora"])
def test_adapter_that_vllm_cannot_serve_is_rejected(config: Config, adapter: str) -> None:
    assert error_of(config(adapter=adapter)).startswith(f"adapter: {adapter} cannot be used")


@pytest.mark.parametrize("adapter", ["lora", "qlora", ""])
def test_adapter_that_vllm_can_serve_is_accepted(config: Config, adapter: str) -> None:
    lower(config(adapter=adapter))


def test_fused_lora_kernels_are_off_unless_set(config: Config) -> None:
    """Axolotl enables them automatically if `rl` is unset."""
    cfg = config(adapter="lora", lora_qkv_kernel=True)
    lower(cfg)
    assert {kernel: cfg[kernel] for kernel in LORA_KERNELS} == dict.fromkeys(LORA_KERNELS, False) | {
        "lora_qkv_kernel": True
    }
    full = config()
    lower(full)
    assert not full.keys() & set(LORA_KERNELS)


def test_pure_16_bit_training_is_rejected(config: Config) -> None:
    assert error_of(config(bf16="full")).startswith("bf16: full ")


def test_adapter_that_cannot_be_merged_is_rejected_before_training(config: Config, tmp_path: Path) -> None:
    lora = {"adapter": "lora", "gptq": True}
    lower(config(**lora))
    assert "adapter_chain: merge" in error_of(config(**lora, spin={"adapter_chain": "merge"}))
    assert "gptq: cannot be combined with peft_use_dora" in error_of(config(**lora, peft_use_dora=True))
    embedding = {"adapter": "lora", "lora_target_modules": ["q_proj", "embed_tokens"]}
    lower(config(**embedding))
    assert "cannot be combined with peft_use_dora" in error_of(config(**embedding, peft_use_dora=True))
    with pytest.raises(SpinError, match="can be merged into a GPTQ model"):
        merge(read_opponent(DictDefault(lora)), tmp_path, tmp_path / "merged")


@pytest.mark.parametrize("kind", [*NO_PROMPT_TYPES, "completion:field", "bradley_terry.chat_template"])
def test_dataset_without_prompts_is_rejected(config: Config, chat_data: Path, kind: str) -> None:
    good, bad = {"path": str(chat_data), "type": "alpaca"}, {"path": str(chat_data), "type": kind}
    assert error_of(config(datasets=[good, bad])).startswith(f"datasets[1].type: {kind} ")
    assert error_of(config(test_datasets=[bad])).startswith(f"test_datasets.type: {kind} ")


@pytest.mark.parametrize("kind", ["chat_template", "alpaca", "input_output", {"field_instruction": "q"}, None])
def test_dataset_with_prompts_is_accepted(config: Config, chat_data: Path, kind: Any) -> None:
    lower(config(datasets=[{"path": str(chat_data), "ds_type": "json", "type": kind}]))


@pytest.mark.parametrize(
    "path", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "data/nowhere.parquet"]
)
def test_missing_local_dataset_is_reported(config: Config, path: str) -> None:
    assert error_of(config(datasets=[{"path": path}])) == f"datasets[0].path: {path} does not exist"


@pytest.mark.parametrize("path", ["org/name", "s3://bucket/rows.jsonl", "https://host/rows.json"])
def test_remote_dataset_is_not_looked_for_on_disk(config: Config, path: str) -> None:
    lower(config(datasets=[{"path": path, "type": "alpaca"}]))


@pytest.mark.parametrize("datasets", [None, [], ["org/name"], [3], {"path": "org/name"}, "org/name", 3])
def test_datasets_must_be_a_list_of_mappings(config: Config, datasets: Any) -> None:
    assert error_of(config(datasets=datasets)).startswith("datasets")


@pytest.mark.parametrize("output_dir", [None, ""])
def test_missing_output_dir(config: Config, output_dir: str | None) -> None:
    assert error_of(config(output_dir=output_dir)).startswith("output_dir: ")


def test_block_without_rl(config: Config) -> None:
    assert "`rl: spin` is missing" in error_of(config(rl=None))


@pytest.mark.parametrize("rl", ["dpo", "kto", "grpo", "spinning"])
def test_other_rl_with_the_block(config: Config, rl: str) -> None:
    assert error_of(config(rl=rl)).startswith(f"`rl: {rl}` cannot be combined")


@pytest.mark.parametrize("rl", ["SPIN", "Spin", " spin"])
def test_rl_must_be_lower_case(config: Config, rl: str) -> None:
    assert error_of(config(rl=rl)) == f"`rl: {rl}`: write `rl: spin`, in lower case"


def test_plugin_without_a_block(config: Config) -> None:
    assert "`spin:` block is missing" in error_of(config(spin=None))


@pytest.mark.parametrize("block", [3, "iterations: 3", []])
def test_block_must_be_a_mapping(config: Config, block: Any) -> None:
    assert error_of(config(spin=block)).startswith("spin: must be a mapping")


def test_invalid_block_is_rejected_with_the_parsers_message(config: Config) -> None:
    message = "spin.betta: unknown key; did you mean `beta`?"
    assert error_of(config(spin={"iterations": 1, "betta": 1})) == message


def test_damaged_base_model_is_reported(config: Config, llama: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(llama, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert str(weights) in error_of(config(base_model=str(damaged)))


# --- the schedule ------------------------------------------------------------------------------


def scheduled(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"iterations": len(entries), "schedule": list(entries)}


def test_schedule_is_applied_to_its_iteration(config: Config, llama: Path) -> None:
    block = scheduled({"learning_rate": 5e-7}, {"learning_rate": 1e-7, "beta": 5.0, "num_epochs": 3})
    first, second = config(spin=block), config(spin=block)
    lower(first)
    assert (first["learning_rate"], first["num_epochs"], first["spin"]["beta"]) == (5e-7, 1, 0.1)
    finish(second, llama)
    lower(second)
    assert (second["learning_rate"], second["num_epochs"], second["spin"]["beta"]) == (1e-7, 3, 5.0)


def test_misspelled_axolotl_key_in_the_schedule_is_reported(config: Config) -> None:
    message = error_of(config(spin=scheduled({}, {"learning_rte": 1e-7})), ("learning_rate", "num_epochs"))
    assert message == "spin.schedule[1].learning_rte: unknown key; did you mean `learning_rate`?"


def test_schedule_cannot_enable_packing(config: Config) -> None:
    cfg = config(spin=scheduled({"sample_packing": True, "train_on_inputs": True}))
    lower(cfg)
    assert (cfg["sample_packing"], cfg["train_on_inputs"]) == (False, False)


@pytest.mark.parametrize("key", ["reinit_weights", "trainer_cls", "reward_model"])
def test_schedule_cannot_set_an_unsupported_key(config: Config, key: str) -> None:
    assert key in error_of(config(spin=scheduled({key: True})))


# --- later iterations --------------------------------------------------------------------------


def test_previous_iterations_model_is_base_and_opponent(config: Config, llama: Path, tmp_path: Path) -> None:
    cfg = config(revision_of_model="abc", tokenizer_config="org/other")
    cfg["base_model_config"] = cfg["base_model"]
    finish(cfg, llama)
    lowered = lower(cfg)
    assert (lowered.iteration, cfg["spin_iteration"]) == (1, 1)
    assert cfg["base_model"] == str(tmp_path / "run" / "iteration-0")
    assert not cfg.keys() & {"revision_of_model", "base_model_config", "tokenizer_config"}
    assert lowered.config["base_model"] == str(llama)
    assert lowered.config["revision_of_model"] == "abc"


def test_first_iteration_keeps_the_pinned_revision(config: Config) -> None:
    cfg = config(base_model="org/model", revision_of_model="abc")
    lower(cfg)
    assert (cfg["base_model"], cfg["revision_of_model"]) == ("org/model", "abc")


def test_previous_iterations_adapter_is_used_with_the_same_base_model(
    config: Config, llama: Path, tmp_path: Path
) -> None:
    cfg = config(adapter="lora", base_model=str(llama), lora_r=4)
    finish(cfg, llama, adapter=True)
    lower(cfg)
    assert cfg["base_model"] == str(llama)
    assert cfg["lora_model_dir"] == str(tmp_path / "run" / "iteration-0")


@pytest.mark.parametrize(
    ("finished", "command", "base", "adapter"),
    [
        (1, {}, "iteration-0/merged", None),
        (2, {}, "iteration-1/merged", None),
        (1, {"merge_lora": True}, None, "iteration-0"),
        (2, {"inference": True}, "iteration-0/merged", "iteration-1"),
    ],
)
def test_merged_model_is_the_base_of_a_new_adapter(
    config: Config, llama: Path, tmp_path: Path, finished: int, command: dict[str, bool], base: str, adapter: str
) -> None:
    cfg = config(adapter="lora", base_model=str(llama), spin={"iterations": 2, "adapter_chain": "merge"}, **command)
    run = finish(cfg, llama, finished, adapter=True)
    for number in range(finished):
        shutil.copytree(llama, run.iteration(number).merged)
    lower(cfg)
    assert cfg["base_model"] == (str(run.root / base) if base else str(llama))
    assert cfg.get("lora_model_dir") == (str(run.root / adapter) if adapter else None)


def test_initial_adapter_is_merged_only_once(config: Config, llama: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "adapter_config.json").write_text(json.dumps({"r": 4}))
    save_file({"lora_A.weight": torch.ones(4, 2)}, start / "adapter_model.safetensors")
    spin = {"iterations": 2, "adapter_chain": "merge"}
    cfg = config(adapter="lora", base_model=str(llama), lora_model_dir=str(start), spin=spin)
    lower(dict(cfg))
    run = finish(cfg, llama, 1, adapter=True)
    shutil.copytree(llama, run.iteration(0).merged)
    lower(cfg)
    assert cfg["base_model"] == str(run.iteration(0).merged)
    assert "lora_model_dir" not in cfg


def test_missing_initial_adapter_is_reported(config: Config) -> None:
    error = error_of(config(adapter="lora", lora_model_dir="org/adapter"))
    assert error == "lora_model_dir: org/adapter is not a local directory; download the adapter first"


def test_first_iteration_with_an_adapter_starts_a_new_one(config: Config) -> None:
    cfg = config(adapter="lora")
    lower(cfg)
    assert "lora_model_dir" not in cfg


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_damaged_model_of_the_previous_iteration_is_reported(config: Config, llama: Path, adapter: str | None) -> None:
    cfg = config(adapter=adapter)
    run = finish(cfg, llama, adapter=bool(adapter))
    weights = next(run.iteration(0).path.glob("*model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in error_of(cfg)


def test_all_iterations_finished(config: Config, llama: Path, tmp_path: Path) -> None:
    """Other commands that read the configuration, such as `evaluate`, then load the last model."""
    cfg = config(spin=scheduled({"learning_rate": 1.0}, {"learning_rate": 2.0}))
    finish(cfg, llama, 2)
    lowered = lower(cfg)
    assert lowered.all_finished
    assert cfg["base_model"] == str(tmp_path / "run" / "iteration-1")
    assert cfg["learning_rate"] == 2.0


def test_fewer_iterations_than_finished(config: Config, llama: Path) -> None:
    cfg = config(spin={"iterations": 1})
    finish(cfg, llama, 2)
    assert lower(cfg).all_finished


def test_damaged_run_json_is_rejected(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    assert "run.json is damaged" in error_of(config())


def test_inference_which_removes_rl_is_accepted(config: Config, llama: Path, tmp_path: Path) -> None:
    cfg = config()
    cfg.update(inference=True, rl=None)
    finish(cfg, llama)
    lower(cfg)
    assert "rl" not in cfg
    assert cfg["base_model"] == str(tmp_path / "run" / "iteration-0")


# --- restoring in another process, and announcements -------------------------------------------


@pytest.mark.parametrize("finished", [0, 1])
def test_restored_configuration_is_the_same(config: Config, llama: Path, finished: int) -> None:
    """A Ray worker receives the lowered configuration as a plain dict."""
    cfg = config(spin=scheduled({"beta": 0.3}, {"beta": 5.0}))
    finish(cfg, llama, finished)
    lowered = lower(cfg)
    restored = restore(DictDefault(json.loads(json.dumps(cfg))))
    assert (restored.run, restored.iteration) == (lowered.run, lowered.iteration)
    assert restored.all_finished == lowered.all_finished
    assert restored.spin.at(restored.iteration) == lowered.spin.at(lowered.iteration)


@pytest.mark.parametrize("finished", [0, 1])
def test_restored_configuration_belongs_to_the_same_run(config: Config, llama: Path, finished: int) -> None:
    """A worker that claims the directory must recognize its driver's run."""
    cfg = config(spin=scheduled({"beta": 0.3}, {"beta": 5.0}))
    finish(cfg, llama, finished)
    lowered = lower(cfg)
    restored = restore(DictDefault(json.loads(json.dumps(cfg))))
    assert differing_keys(lowered.config, restored.config, finished) == []


@pytest.mark.parametrize(("finished", "opponent"), [(0, "{base_model}"), (1, "the model of iteration 0")])
def test_announcement_names_iteration_and_opponent(
    config: Config, llama: Path, capsys: pytest.CaptureFixture[str], finished: int, opponent: str
) -> None:
    cfg = config(learning_rate=5e-6)
    finish(cfg, llama, finished)
    lowered: Lowered = lower(cfg)
    announce(lowered, read_opponent(DictDefault(cfg)), read_training(DictDefault(cfg)))
    expected = opponent.format(base_model=lowered.config["base_model"])
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"spin: note: iteration {finished} of 0…1, opponent: {expected}"
    assert len(others) == (finished == 0), "the first iteration also announces the cost of later ones"


def announced(cfg: MutableMapping[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    lowered = lower(cfg)
    announce(lowered, read_opponent(DictDefault(cfg)), read_training(DictDefault(cfg)))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("iterations", "history", "expected"), [(4, 1, "up to 2 times"), (4, 2, "up to 3 times"), (2, 5, "up to 2 times")]
)
def test_cost_of_mixing_in_responses_is_announced(
    config: Config, capsys: pytest.CaptureFixture[str], iterations: int, history: int, expected: str
) -> None:
    spin = {"iterations": iterations, "history_iterations": history}
    assert expected in announced(config(spin=spin), capsys)


@pytest.mark.parametrize("spin", [{"iterations": 1}, {"iterations": 4, "history_iterations": 0}])
def test_no_cost_is_announced_without_mixing(
    config: Config, capsys: pytest.CaptureFixture[str], spin: dict[str, Any]
) -> None:
    assert "times" not in announced(config(spin=spin), capsys)


@pytest.mark.parametrize(
    ("changes", "high"),
    [
        ({"learning_rate": 5e-6}, False), ({"learning_rate": 6e-6}, True),
        ({"learning_rate": 1e-4, "adapter": "lora"}, False), ({"learning_rate": 2e-4, "adapter": "lora"}, True),
    ],
)  # fmt: skip
def test_learning_rate_typical_of_sft_logs_a_warning(
    config: Config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], high: bool
) -> None:
    output = announced(config(**changes), capsys)
    assert ("spin: warning: learning_rate" in output) is high


def test_learning_rate_set_in_the_schedule_logs_a_warning_again(
    config: Config, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(config(), llama, 1)
    for entry, warned in (({}, False), ({"learning_rate": 1e-3}, True)):
        cfg = config(learning_rate=1e-3, spin={"iterations": 2, "schedule": [{}, entry]})
        assert ("warning" in announced(cfg, capsys)) is warned


# --- Axolotl's own keys ------------------------------------------------------------------------


def test_rl_beta_is_an_alias_of_beta(config: Config) -> None:
    for spin in ({"iterations": 1}, {"iterations": 1, "beta": 0.3}):
        cfg = config(spin=spin, rl_beta=0.3)
        lowered = lower(cfg)
        assert cfg["spin"]["beta"] == lowered.spin.beta == lowered.config["spin"]["beta"] == 0.3
        assert cfg.get("rl_beta") is None


def test_conflicting_values_of_beta_are_rejected(config: Config) -> None:
    assert "rl_beta: 0.2 and spin.beta: 0.3 differ" in error_of(config(spin={"beta": 0.3}, rl_beta=0.2))
    assert error_of(config(rl_beta="3e-1", spin={"beta": 0.2})) != ""
    lower(config(rl_beta="3e-1", spin={"beta": 0.3}))  # YAML parses `3e-1` as a string


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rl_beta": 0.2}, "schedule[1].rl_beta: write `beta`"),
        ({"vllm": {"tensor_parallel_size": 2}}, "schedule[1].vllm cannot change"),
        ({"trl": {"beta": 1}}, "trl: cannot be used"),
        ({"bf16": "full"}, "bf16: full"),
    ],
)
def test_unsupported_key_in_a_later_schedule_entry_is_rejected_at_the_start(
    config: Config, entry: dict[str, Any], message: str
) -> None:
    assert message in error_of(config(spin={"iterations": 2, "schedule": [{}, entry]}))


def test_server_keys_of_the_vllm_block_are_announced_as_ignored(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(vllm={"host": "0.0.0.0", "port": 8000, "tensor_parallel_size": 2})
    assert "ignored: vllm.host, vllm.port: " in announced(cfg, capsys)
    assert cfg["spin_vllm"] == {"tensor_parallel_size": 2}
    assert cfg["vllm"]["host"] == "0.0.0.0", "`axolotl vllm-serve` reads it"
    assert "vllm.tensor_parallel_sise" in error_of(config(vllm={"tensor_parallel_sise": 2}))


# --- runs that are not SPIN --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"plugins": None}, True),
        ({"spin": None}, True),
        ({"rl": None, "plugins": None, "spin": {}}, True),
        ({"rl": None, "plugins": None}, True),
        ({"rl": None, "spin": None}, True),
        ({"rl": "SPIN", "spin": None, "plugins": None}, True),
        ({"rl": "dpo", "spin": None, "plugins": None}, False),
        ({"rl": None, "spin": None, "plugins": ["axolotl.integrations.liger.LigerPlugin"]}, False),
        ({"rl": None, "spin": None, "plugins": None}, False),
    ],
)
def test_any_reference_to_spin_makes_a_spin_run(config: Config, changes: dict[str, Any], expected: bool) -> None:
    """A misspelled or incomplete SPIN configuration must not train something else."""
    assert asks_for_spin(config(**changes)) is expected


def test_configuration_that_axolotl_rejects_is_restored(config: Config) -> None:
    cfg = config(rl_beta=0.3, spin={"iterations": 2}, hf_token="hf_secret")
    before = json.loads(json.dumps(cfg))
    plugin = SpinPlugin()
    plugin.register(cfg)
    assert cfg.get("rl") is None
    plugin.on_config_validation_error(cfg)
    assert json.loads(json.dumps(cfg)) == before
    assert plugin.get_input_args() is None
    assert "hf_secret" not in repr(lower(cfg))


def test_resolved_configuration_of_an_iteration_cannot_start_a_run(config: Config) -> None:
    cfg = config()
    lower(cfg)
    del cfg["spin_config"]
    with pytest.raises(SpinError, match="train with the original"):
        restore(cfg)
