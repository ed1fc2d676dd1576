"""Merge an adapter into its base model: if vLLM cannot serve the adapter, and for `adapter_chain: merge`."""

import json
import shutil
from pathlib import Path

from spin_plugin.config.specs import OpponentSpec
from spin_plugin.console import SpinError, say
from spin_plugin.run.atomic import write_dir_atomically
from spin_plugin.run.checkpoint import check_safetensors, check_weights

# Settings of peft's adapter_config.json that vLLM's LoRA does not support. vLLM before 0.32 ignores ranks and alphas of
# single modules without an error, and would generate with another opponent.
NOT_SERVED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
             "*.model", "tekken.json")  # fmt: skip


def vllm_can_serve(adapter: Path) -> bool:
    """Whether vLLM can serve the adapter without merging it."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return not any(config.get(key) for key in NOT_SERVED)


def merge(opponent: OpponentSpec, adapter: Path, target: Path, *, tokenizer: Path | None = None) -> None:
    """Merge an adapter into the unquantized base model, using Axolotl's own merge.

    Args:
        opponent: its base model is used.
        adapter: the adapter's directory.
        target: the model's directory, written atomically.
        tokenizer: the directory to copy the tokenizer from; None: the base model's.

    Raises:
        SpinError: the result would not be base model plus adapter.
    """
    import torch
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    if opponent.gptq:
        raise SpinError("gptq: vLLM cannot serve this adapter, and no adapter can be merged into a GPTQ model")
    _require_mergeable(opponent, adapter)
    say(f"merging {adapter} into its base model")

    def fill(directory: Path) -> None:
        merge_lora_sharded_efficient(
            base_model_path=opponent.base_model,
            lora_adapter_path=adapter,
            output_path=directory,
            device="cuda" if torch.cuda.is_available() else "cpu",
            **opponent.hub,
        )
        for file in (file for pattern in TOKENIZER if tokenizer for file in tokenizer.glob(pattern)):
            shutil.copy(file, directory)

    write_dir_atomically(target, fill)


def _require_mergeable(opponent: OpponentSpec, adapter: Path) -> None:
    """Refuse adapters that Axolotl 0.19 merges incompletely.

    It iterates over the base model's tensors, so it skips the LoRA of an embedding and everything for a tied LM head.

    Raises:
        SpinError: the result would not be base model plus adapter.
    """
    from transformers import AutoConfig

    tied = AutoConfig.from_pretrained(opponent.base_model, **opponent.hub).get_text_config().tie_word_embeddings
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    names = [name for file in check_weights(adapter, "adapter_model") for name in check_safetensors(file)]
    lost = {
        "the LoRA of an embedding": any("lora_embedding" in name for name in names),
        "the LoRA of a tied LM head": tied and any("lm_head.lora" in name for name in names),
        "a saved embedding or LM head, which are tied (without peft_ensure_weight_tying)": tied
        and not settings.get("ensure_weight_tying")
        and bool({"lm_head", "embed_tokens"} & set(settings.get("modules_to_save") or ())),
    }
    for what, is_lost in lost.items():
        if is_lost:
            raise SpinError(f"{adapter}: cannot be merged into its base model: {what} would be lost")
