"""What SPIN cannot use, refused in one line that names the key and the reason."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.config.plain import plain
from spin_plugin.console import SpinError

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


def refuse_what_cannot_be_merged(cfg: Mapping[str, Any], spin: SpinArgs) -> None:
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
    entry = plain(dataset)
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
