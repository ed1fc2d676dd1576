"""Reject options that SPIN does not support, with one line that names the key and the reason."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spin_plugin.args import SpinArgs
from spin_plugin.config.plain import plain
from spin_plugin.console import SpinError

# Unsupported keys and the reason.
REFUSED = {
    "reward_model": "SPIN trains a language model, not a reward model",
    "process_reward_model": "SPIN trains a language model, not a reward model",
    "pretraining_dataset": "SPIN needs prompts and responses; list an SFT dataset under `datasets`",
    "streaming": "SPIN generates a response for every prompt before training, so it needs the complete dataset",
    "processor_type": "multimodal training is not supported",
    "skip_prepare_dataset": "SPIN needs tokenized prompts and responses",
    "reinit_weights": "the opponent would differ from the model that training starts from",
    "fix_untrained_tokens": "the opponent would differ from the model that training starts from",
    "relora": "ReLoRA merges adapters during training, so the opponent would change",
    "peft_layer_replication": "vLLM cannot serve adapters with replicated layers",
    "peft_trainable_token_indices": "vLLM cannot serve adapters with trained tokens",
    "use_onebitllms": "vLLM would generate with a different model than the one being trained",
    "qat": "vLLM would generate with a different model than the one being trained",
    "neftune_noise_alpha": "training noise makes the policy differ from the opponent before the first step",
    "noisy_embedding_alpha": "training noise makes the policy differ from the opponent before the first step",
    "scaling_softmax": "vLLM does not support it and would generate with a different model than the one being trained",
    "use_pose": "it changes token positions, so vLLM would generate with a different model than the one being trained",
    "use_dft": "it is an SFT loss; choose SPIN's with spin.loss_type",
    "use_eaft": "it is an SFT loss; choose SPIN's with spin.loss_type",
    "auto_find_batch_size": "steps would lose pairs; lower micro_batch_size and raise gradient_accumulation_steps",
    "diffusion_lm": "it is a different method with its own trainer",
    "trainer_cls": "SPIN has its own trainer",
    "eval_table_size": "its callback expects SFT batches, not pairs",
    "do_causal_lm_eval": "its callback expects SFT batches, not pairs",
    "do_bench_eval": "its callback expects SFT batches, not pairs",
    "generate_samples": "its callback expects SFT batches, not pairs",
}
# Options of other methods, which SPIN would ignore.
REFUSED |= dict.fromkeys(
    (
        "dpo_beta", "dpo_norm_loss", "dpo_ld_alpha", "rpo_alpha", "orpo_alpha", "simpo_gamma", "cpo_alpha",
        "kto_desirable_weight", "kto_undesirable_weight", "trl",
    ),
    "it belongs to a different method; SPIN's options are in the `spin:` block",
)  # fmt: skip
NO_PROMPT_TYPES = ("completion", "pretrain", "bradley_terry", "stepwise_supervised", "_synthetic")
ADAPTERS = (None, "", "lora", "qlora")


def refuse(cfg: Mapping[str, Any]) -> None:
    """Reject a raw configuration that SPIN does not support.

    Raises:
        SpinError: names the first unsupported key and the reason.
    """
    for reason in refusals(cfg):
        raise SpinError(reason)


def refusals(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key of a raw configuration that SPIN does not support."""
    for key, reason in REFUSED.items():
        if cfg.get(key):
            yield f"{key}: cannot be used with `rl: spin`: {reason}"
    for key in ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"):
        if str(cfg.get(key) or 1) != "1":  # Axolotl has not checked its type yet
            yield (
                f"{key}: cannot be used with `rl: spin`: every rank processes its own pairs; shard the model "
                "with FSDP2 or DeepSpeed ZeRO-3 instead"
            )
    if cfg.get("bf16") == "full":
        yield "bf16: full trains 16-bit weights, in which small updates are lost to rounding; use `bf16: true`"
    accelerator = cfg.get("accelerator_config")
    own = accelerator.keys() if isinstance(accelerator, Mapping) else set()
    if batches := own & {"split_batches", "dispatch_batches", "even_batches"}:
        yield f"accelerator_config.{min(batches)}: cannot be used with `rl: spin`: pairs could be duplicated"
    if "MambaLMHeadModel" in (cfg.get("model_type"), cfg.get("type_of_model")):
        yield "model_type: MambaLMHeadModel cannot be used with `rl: spin`: vLLM cannot load it"
    if cfg.get("adapter") not in ADAPTERS:
        yield f"adapter: {cfg['adapter']} cannot be used with `rl: spin`: vLLM cannot serve it; use lora or qlora"
    if cfg.get("base_model_config") not in (None, "", cfg.get("base_model")):
        yield "base_model_config: must equal base_model, because vLLM reads the config beside the weights"
    yield from _adapter_start(cfg)
    yield from _datasets(cfg)


def refuse_other_trainers(cfg: Any, plugins: Iterable[Any]) -> None:
    """Reject plugins and models with their own trainer or collator, once Axolotl has loaded them.

    Axolotl uses the first plugin's trainer and silently ignores the others, possibly SPIN's.

    Raises:
        SpinError: names the plugin or `base_model`.
    """
    for plugin in plugins:
        if plugin.get_trainer_cls(cfg) or plugin.get_collator_cls_and_kwargs(cfg):
            raise SpinError(
                f"plugins: {type(plugin).__name__} has its own trainer or collator, which would replace SPIN's; "
                "remove it"
            )
    if cfg.model_config_type == "mamba":  # axolotl 0.19
        raise SpinError("base_model: Axolotl gives Mamba models their own collator, which cannot batch pairs")


def refuse_unmergeable(cfg: Mapping[str, Any], spin: SpinArgs) -> None:
    """Reject adapters that must be merged but that Axolotl's merge silently skips.

    It skips GPTQ models, LoRA on embeddings, and LoRA on a head tied to the embedding.

    Raises:
        SpinError: names the two conflicting keys.
    """
    merged = [f"lora_{name}" for name in ("modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")]
    needs = [key for key in ("peft_use_dora", *merged) if cfg.get(key)]
    if spin.adapter_chain == "merge":
        needs.append("spin.adapter_chain: merge")
    if cfg.get("gptq") and needs:
        raise SpinError(f"gptq: cannot be combined with {needs[0]}: adapters cannot be merged into a GPTQ model")
    for module in ("embed_tokens", "lm_head"):
        if needs and module in str(cfg.get("lora_target_modules")):
            raise SpinError(
                f"lora_target_modules: {module} cannot be combined with {needs[0]}: Axolotl may skip it in a merge"
            )


def _adapter_start(cfg: Mapping[str, Any]) -> Iterator[str]:
    """PiSSA, LoftQ and similar initializations change the base model; vLLM loads the original one."""
    start = cfg.get("peft_init_lora_weights")
    if start not in (None, True, False, "gaussian"):
        yield f"peft_init_lora_weights: {start} changes the base model, but vLLM loads the original one; use true"
    peft = cfg.get("peft")
    if isinstance(peft, Mapping) and peft.get("loftq_config"):
        yield "peft.loftq_config: changes the base model, but vLLM loads the original one; remove it"


def _datasets(cfg: Mapping[str, Any]) -> Iterator[str]:
    if not cfg.get("datasets"):
        yield "datasets: missing; list at least one SFT dataset"
    for key in ("datasets", "test_datasets"):
        entries = cfg.get(key) or []
        if not isinstance(entries, list | tuple):
            yield f"{key}: must be a list of mappings with `path` and `type`"
            continue
        for number, dataset in enumerate(entries):
            yield from _dataset(f"datasets[{number}]" if key == "datasets" else key, dataset)


def _dataset(name: str, dataset: Any) -> Iterator[str]:
    if not isinstance(dataset, Mapping) and not hasattr(dataset, "model_dump"):
        yield f"{name}: must be a mapping with `path` and `type`"
        return
    entry = plain(dataset)
    kind = entry.get("type")
    if isinstance(kind, str) and kind.split(":")[0].split(".")[0] in NO_PROMPT_TYPES:
        yield f"{name}.type: {kind} has no prompts; use an instruction or chat format"
    for key in ("train_on_eos", "train_on_eot"):
        if entry.get(key) == "all":
            yield f"{name}.{key}: `all` also trains on the end tokens of user turns; use `turn`"
    path = str(entry.get("path") or "")
    looks_local = path.startswith((".", "/", "~")) or Path(path).suffix in (
        ".json",
        ".jsonl",
        ".csv",
        ".parquet",
        ".arrow",
    )
    if looks_local and "://" not in path and not Path(path).expanduser().exists():
        yield f"{name}.path: {path} does not exist"
