"""`rl: spin` becomes the supervised Axolotl run that plays the next unfinished iteration.

`rl` is a closed enumeration in Axolotl, so the key is gone before validation. What stays is an SFT
configuration: `datasets:` keep every format Axolotl knows, no reference model is loaded, and the plugin's
hooks provide data, trainer and collator.
"""

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_plugin.args import SpinArgs, parse_spin_block, parse_vllm_block
from spin_plugin.checkpoint import check_model_dir
from spin_plugin.messages import SpinError, say, warn
from spin_plugin.run import RunDir, same_value, without_secrets

PLUGIN = "spin_plugin.SpinPlugin"

# What SPIN cannot use, and why.
REFUSED = {
    "reward_model": "SPIN trains a language model, not a reward model",
    "process_reward_model": "SPIN trains a language model, not a reward model",
    "pretraining_dataset": "SPIN needs prompts and responses; name an SFT dataset under `datasets`",
    "streaming": "SPIN draws a response for every prompt, so it needs the whole dataset",
    "processor_type": "multimodal training is not supported",
    "skip_prepare_dataset": "SPIN needs the tokenised prompts and responses",
    "reinit_weights": "the opponent would not be the model that training starts from",
    "fix_untrained_tokens": "the opponent would not be the model that training starts from",
    "relora": "ReLoRA merges adapters during training, which SPIN's opponent cannot follow",
    "peft_layer_replication": "vLLM cannot serve adapters of replicated layers",
    "peft_trainable_token_indices": "vLLM cannot serve adapters that hold trained tokens",
    "use_onebitllms": "vLLM would draw from another model than the one that is trained",
    "qat": "vLLM would draw from another model than the one that is trained",
    "neftune_noise_alpha": "noise in training makes the policy differ from the opponent before any step",
    "noisy_embedding_alpha": "noise in training makes the policy differ from the opponent before any step",
    "scaling_softmax": "vLLM, which does not know it, would draw from another model than the one that is trained",
    "use_pose": "it moves the prompts' positions, so vLLM would draw from another model than the one that is trained",
    "use_dft": "it is a loss of SFT; SPIN's is chosen by spin.loss_type",
    "use_eaft": "it is a loss of SFT; SPIN's is chosen by spin.loss_type",
    "auto_find_batch_size": "a step would lose pairs; lower micro_batch_size and raise gradient_accumulation_steps",
    "diffusion_lm": "it is another method, with a trainer of its own",
    "trainer_cls": "SPIN brings its own trainer",
    "eval_table_size": "its callback reads SFT batches; SPIN's hold pairs",
    "do_causal_lm_eval": "its callback reads SFT batches; SPIN's hold pairs",
    "do_bench_eval": "its callback reads SFT batches; SPIN's hold pairs",
    "generate_samples": "its callback reads SFT batches; SPIN's hold pairs",
}
# What belongs to another method and would be ignored.
REFUSED |= dict.fromkeys(
    (
        "dpo_beta", "dpo_norm_loss", "dpo_ld_alpha", "rpo_alpha", "orpo_alpha", "simpo_gamma", "cpo_alpha",
        "kto_desirable_weight", "kto_undesirable_weight", "trl",
    ),
    "it belongs to another method; SPIN's options are those of the `spin:` block",
)  # fmt: skip
NO_PROMPT_TYPES = ("completion", "pretrain", "bradley_terry", "stepwise_supervised", "_synthetic")
ADAPTERS = (None, "", "lora", "qlora")

# What an SFT configuration may well say and SPIN has to answer differently.
SFT_ONLY: dict[str, Any] = {
    "sample_packing": False,  # a pair is one unit; packing would drop and split rows
    "eval_sample_packing": False,
    "batch_flattening": False,
    "pad_to_sequence_len": False,
    "train_on_inputs": False,  # the labels tell where the prompt ends
    "balance_labels": False,  # a step holds so many pairs, whatever their lengths
    "dataloader_drop_last": False,  # an epoch plays every pair
    "auto_resume_from_checkpoints": True,  # the debug log of one run goes on
}
# Above it a warning says so. The paper's full fine-tune of 7B has 5e-7.
HIGHEST_LEARNING_RATE = {"full": 5e-6, "adapter": 1e-4}
# Fused kernels for GPUs; nobody has compared them with the plain layers under SPIN's two responses a row yet.
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@dataclass(frozen=True)
class Lowered:
    """What the later hooks need to know of the configuration as the user wrote it."""

    run: RunDir
    spin: SpinArgs
    iteration: int
    """The next unfinished iteration; `spin.iterations` when all are finished."""
    config: dict[str, Any]
    """The user's configuration without secrets, as run.json keeps it."""
    unused_vllm_keys: tuple[str, ...] = ()
    """What the `vllm:` block says about a server."""
    written: dict[str, Any] = field(default_factory=dict, repr=False)
    """The user's configuration as it was, until Axolotl has validated the lowered one."""

    @property
    def all_finished(self) -> bool:
        return self.iteration >= self.spin.iterations


def lower(cfg: MutableMapping[str, Any], known_axolotl_keys: Iterable[str] = ()) -> Lowered:
    """Rewrite a raw configuration in place.

    Raises:
        SpinError: the configuration asks for something SPIN cannot do, or is not a SPIN configuration at all.
    """
    written = _plain(cfg)
    _require_spin(cfg)
    _take_rl_beta(cfg)
    original = without_secrets(_plain(cfg))
    spin = parse_spin_block(_plain(cfg["spin"]), known_axolotl_keys)
    refuse(cfg)
    if not cfg.get("output_dir"):
        raise SpinError("output_dir: name the directory of the run, for example `output_dir: ./outputs/spin`")
    if cfg.get("use_ray"):  # its workers work elsewhere
        cfg["output_dir"] = str(Path(cfg["output_dir"]).absolute())
    run = RunDir(Path(cfg["output_dir"]))
    run.require_writable()  # Axolotl opens its log there next
    iteration = run.finished()
    cfg.pop("resume_from_checkpoint", None)  # resuming needs no key
    if cfg.get("adapter"):
        for kernel in LORA_KERNELS:  # Axolotl switches them on where no `rl` is set, and ours is gone by then
            cfg.setdefault(kernel, False)
    if cfg.get("lora_modules_to_save") and cfg.get("peft_ensure_weight_tying") is None:
        cfg["peft_ensure_weight_tying"] = True  # an embedding that is also the head stays one, in whatever is merged
    # The next opponent is the model at the end of the iteration, unless the user asks for the best one.
    cfg["load_best_model_at_end"] = bool(cfg.get("load_best_model_at_end"))
    current = min(iteration, spin.iterations - 1)
    for key, value in spin.axolotl_overrides(current).items():
        cfg[key] = value
    for entry in spin.schedule:  # what it brings in later is refused now
        refuse({**cfg, **entry})
    vllm, unused = parse_vllm_block(_plain(cfg.get("vllm")) or {})
    _refuse_what_cannot_be_merged(cfg, spin)
    cfg.update(SFT_ONLY)
    _start_from_opponent(cfg, run, iteration, merged=spin.adapter_chain == "merge")
    del cfg["rl"]
    cfg["spin"] = spin.at(current).model_dump(exclude_none=True, exclude={"schedule"})
    cfg["spin_vllm"] = vllm.model_dump(exclude_unset=True)
    cfg["spin_iteration"] = iteration
    cfg["spin_config"] = original
    return Lowered(run, spin, iteration, original, unused, written)


def put_back(cfg: MutableMapping[str, Any], lowered: Lowered) -> None:
    """Undo `lower`: Axolotl refuses the configuration, and whoever reads it next finds what the user wrote."""
    if lowered.written:
        cfg.clear()
        cfg.update(lowered.written)


def restore(cfg: Mapping[str, Any]) -> Lowered:
    """The same for a configuration that was lowered in another process (a Ray worker)."""
    if cfg.get("spin_config") is None:
        raise SpinError("this is the resolved configuration of one iteration; train with the one that you wrote")
    spin = parse_spin_block(_plain(cfg["spin"]))
    return Lowered(RunDir(Path(cfg["output_dir"])), spin, int(cfg["spin_iteration"]), _plain(cfg["spin_config"]))


def _plain(value: Any) -> Any:
    """Plain dicts and lists, independent of Axolotl's, whose missing keys read as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(exclude_none=True))
    return copy.deepcopy(value)


def names_the_plugin(cfg: Mapping[str, Any]) -> bool:
    """Whether `plugins:` lists ours."""
    return any(str(name).replace(":", ".") == PLUGIN for name in cfg.get("plugins") or [])


def concerns_spin(cfg: Mapping[str, Any]) -> bool:
    """Whether a raw configuration asks for SPIN, by any of the keys that somebody who wants it writes."""
    return names_the_plugin(cfg) or "spin" in cfg or str(cfg.get("rl")).strip().lower() == "spin"


def _take_rl_beta(cfg: MutableMapping[str, Any]) -> None:
    """Axolotl's and TRL's word for the strength of the hold; two that differ cannot both be meant."""
    rl_beta, block = cfg.pop("rl_beta", None), cfg["spin"]
    if rl_beta is None or not isinstance(block, Mapping):
        return
    if block.get("beta") is not None and not same_value(block["beta"], rl_beta):
        raise SpinError(f"rl_beta: {rl_beta} and spin.beta: {block['beta']} differ; remove one of them")
    cfg["spin"] = {**block, "beta": rl_beta}


def _require_spin(cfg: Mapping[str, Any]) -> None:
    """A run must never silently be something else than SPIN."""
    rl, block = cfg.get("rl"), cfg.get("spin")
    rl = "spin" if cfg.get("inference") and rl is None else rl  # `axolotl inference` takes `rl` away itself
    if rl is None:
        raise SpinError(f"`rl: spin` is missing though {PLUGIN} is loaded; add it, or remove the plugin and `spin:`")
    if rl != "spin" and str(rl).strip().lower() == "spin":
        raise SpinError(f"`rl: {rl}`: write `rl: spin`, in lower case")
    if rl != "spin":
        raise SpinError(
            f"`rl: {rl}` cannot be combined with {PLUGIN}; use `rl: spin`, or remove the plugin and `spin:`"
        )
    if block is None:
        raise SpinError("the `spin:` block is missing; add one, for example `spin: {iterations: 3}`")


def refuse(cfg: Mapping[str, Any]) -> None:
    """Raise for what SPIN cannot use, and say why."""
    for key, reason in REFUSED.items():
        if cfg.get(key):
            raise SpinError(f"{key}: cannot be used with `rl: spin`: {reason}")
    for key in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if str(cfg.get(key) or 1) != "1":  # Axolotl has not checked its type yet
            raise SpinError(
                f"{key}: cannot be used with `rl: spin`: every rank works on pairs of its own; share the model "
                "by FSDP2 or DeepSpeed ZeRO-3 instead"
            )
    if cfg.get("bf16") == "full":
        raise SpinError(
            "bf16: full trains weights of 16 bits, where rounding takes small updates back; use `bf16: true`"
        )
    accelerator = cfg.get("accelerator_config")
    own = accelerator.keys() if isinstance(accelerator, Mapping) else set()
    if batches := own & {"split_batches", "dispatch_batches", "even_batches"}:
        raise SpinError(f"accelerator_config.{min(batches)}: cannot be used with `rl: spin`: pairs would count twice")
    if "MambaLMHeadModel" in (cfg.get("model_type"), cfg.get("type_of_model")):
        raise SpinError("model_type: MambaLMHeadModel cannot be used with `rl: spin`: vLLM cannot load it")
    if cfg.get("adapter") not in ADAPTERS:
        raise SpinError(
            f"adapter: {cfg['adapter']} cannot be used with `rl: spin`: vLLM serves lora and qlora adapters"
        )
    if cfg.get("base_model_config") not in (None, "", cfg.get("base_model")):
        raise SpinError("base_model_config: must be base_model itself: vLLM reads the file beside the weights")
    _refuse_adapter_start(cfg)
    _refuse_datasets(cfg)


def refuse_other_trainers(cfg: Any, plugins: Iterable[Any]) -> None:
    """What only shows when Axolotl has validated the configuration and loaded all plugins. The first plugin's trainer
    is taken, so that of another would be passed over in silence, or ours.

    Raises:
        SpinError: names the plugin.
    """
    for plugin in plugins:
        if plugin.get_trainer_cls(cfg) or plugin.get_collator_cls_and_kwargs(cfg):
            raise SpinError(
                f"plugins: {type(plugin).__name__} brings a trainer or batches of its own, so this would not be SPIN; "
                "remove it"
            )
    if cfg.model_config_type == "mamba":  # axolotl 0.19
        raise SpinError("base_model: Axolotl gives Mamba models batches of its own, which cannot hold pairs")


def _refuse_what_cannot_be_merged(cfg: Mapping[str, Any], spin: SpinArgs) -> None:
    """Axolotl's merge passes over a GPTQ model, an embedding's LoRA, and that of a head which is the embedding."""
    merged = [f"lora_{name}" for name in ("modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")]
    needs = [key for key in ("peft_use_dora", *merged) if cfg.get(key)]
    if spin.adapter_chain == "merge":
        needs.append("spin.adapter_chain: merge")
    if cfg.get("gptq") and needs:
        raise SpinError(f"gptq: cannot be combined with {needs[0]}: nothing can be merged into a GPTQ model")
    for module in ("embed_tokens", "lm_head"):
        if needs and module in str(cfg.get("lora_target_modules")):
            raise SpinError(f"lora_target_modules: {module} cannot be combined with {needs[0]}: it may not be merged")


def _refuse_adapter_start(cfg: Mapping[str, Any]) -> None:
    """PiSSA, LoftQ and their like change the base model when they start; vLLM adds the adapter to the original."""
    start = cfg.get("peft_init_lora_weights")
    if start not in (None, True, False, "gaussian"):
        raise SpinError(
            f"peft_init_lora_weights: {start} changes the base model, which vLLM would not know of; use true"
        )
    peft = cfg.get("peft")
    if isinstance(peft, Mapping) and peft.get("loftq_config"):
        raise SpinError("peft.loftq_config: changes the base model, which vLLM would not know of; remove it")


def _refuse_datasets(cfg: Mapping[str, Any]) -> None:
    if not cfg.get("datasets"):
        raise SpinError("datasets: SPIN needs at least one SFT dataset")
    for key in ("datasets", "test_datasets"):
        if not isinstance(cfg.get(key) or [], list | tuple):
            raise SpinError(f"{key}: must be a list of mappings with `path` and `type`")
    for number, dataset in enumerate([*cfg["datasets"], *(cfg.get("test_datasets") or [])]):
        _refuse_dataset(f"datasets[{number}]" if number < len(cfg["datasets"]) else "test_datasets", dataset)


def _refuse_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Mapping) and not hasattr(dataset, "model_dump"):
        raise SpinError(f"{name}: must be a mapping with `path` and `type`")
    entry = _plain(dataset)
    kind = entry.get("type")
    if isinstance(kind, str) and kind.split(":")[0].split(".")[0] in NO_PROMPT_TYPES:
        raise SpinError(f"{name}.type: {kind} has no prompt to answer; SPIN needs an instruction or chat format")
    for key in ("train_on_eos", "train_on_eot"):
        if entry.get(key) == "all":
            raise SpinError(f"{name}.{key}: `all` trains on the ends of user turns, which are no responses; use `turn`")
    path = str(entry.get("path") or "")
    looks_local = path.startswith((".", "/", "~")) or Path(path).suffix in (
        ".json",
        ".jsonl",
        ".csv",
        ".parquet",
        ".arrow",
    )
    if looks_local and "://" not in path and not Path(path).expanduser().exists():
        raise SpinError(f"{name}.path: {path} does not exist")


def _start_from_opponent(cfg: MutableMapping[str, Any], run: RunDir, iteration: int, *, merged: bool) -> None:
    """The model of iteration t-1 is base and opponent of iteration t; with an adapter, base plus adapter is.

    Args:
        merged: the adapter of every iteration was merged into its base model.
    """
    state = run.read_state()
    # Another base model on the command line (`axolotl inference --base-model …`) is meant; training refuses it later.
    if iteration > 0 and state and cfg.get("base_model") == state.config.get("base_model"):
        previous = run.iteration(iteration - 1).path
        check_model_dir(previous, adapter=bool(cfg.get("adapter")))
        if not cfg.get("adapter"):
            _take_base(cfg, previous)
        elif not merged:
            cfg["lora_model_dir"] = str(previous)
        elif not (cfg.get("merge_lora") or cfg.get("inference")):
            _take_base(cfg, run.iteration(iteration - 1).merged)
            cfg.pop("lora_model_dir", None)  # an adapter that the run started from is merged, too
        else:  # they want the newest adapter and the base that it was trained on
            cfg["lora_model_dir"] = str(previous)
            if iteration > 1:
                _take_base(cfg, run.iteration(iteration - 2).merged)
    elif cfg.get("adapter") and cfg.get("lora_model_dir"):
        if not Path(cfg["lora_model_dir"]).is_dir():
            raise SpinError(f"lora_model_dir: {cfg['lora_model_dir']} is no directory here; download the adapter first")
        check_model_dir(Path(cfg["lora_model_dir"]), adapter=True)
    base = Path(str(cfg.get("base_model") or ""))
    if base.is_dir():
        check_model_dir(base, tokenizer_elsewhere=bool(cfg.get("tokenizer_config")))


def _take_base(cfg: MutableMapping[str, Any], model: Path) -> None:
    cfg["base_model"] = str(model)
    for key in ("base_model_config", "revision_of_model", "tokenizer_config"):
        cfg.pop(key, None)


def announce(cfg: Any, lowered: Lowered) -> None:
    """Say what the command is about to do, and what may surprise in it.

    Args:
        cfg: Axolotl's validated configuration.
        lowered: what it was lowered from.
    """
    number, spin = lowered.iteration, lowered.spin
    adapter = f" with the adapter {cfg.lora_model_dir}" if cfg.adapter and cfg.lora_model_dir else ""
    opponent = f"{lowered.config['base_model']}{adapter}" if number == 0 else f"the model of iteration {number - 1}"
    say(f"iteration {number} of 0…{spin.iterations - 1}, opponent: {opponent}")
    if number == 0 and (mixed := min(spin.history_iterations, spin.iterations - 1)):
        say(
            f"later iterations also train on the responses of up to {mixed} before them, which costs up to {1 + mixed} "
            f"times this one (spin.history_iterations: {spin.history_iterations}; 0 leaves them out)"
        )
    if lowered.unused_vllm_keys:
        keys = ", ".join(f"vllm.{key}" for key in lowered.unused_vllm_keys)
        say(f"not used: {keys}: SPIN runs vLLM itself and needs no server")
    highest = HIGHEST_LEARNING_RATE["adapter" if cfg.adapter else "full"]
    if cfg.learning_rate > highest and (number == 0 or "learning_rate" in spin.axolotl_overrides(number)):
        warn(
            f"learning_rate {cfg.learning_rate:g} is high for SPIN, where most runs collapse above {highest:g} "
            f"({'with an adapter' if cfg.adapter else 'full fine-tune'}); take a tenth to a fortieth of the SFT's"
        )
