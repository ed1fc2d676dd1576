"""Base model plus adapter as one checkpoint: where vLLM cannot serve the adapter, and for `adapter_chain: merge`."""

import json
import shutil
from pathlib import Path

from spin_plugin.config.specs import OpponentSpec
from spin_plugin.console import SpinError, say
from spin_plugin.run.atomic import write_dir_atomically
from spin_plugin.run.checkpoint import check_safetensors, check_weights

# Of peft's adapter_config.json: what vLLM's LoRA knows nothing of. Versions before 0.32 would pass over a rank or an
# alpha of single modules in silence, and draw from another opponent.
NOT_SERVED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
             "*.model", "tekken.json")  # fmt: skip


def served_by_vllm(adapter: Path) -> bool:
    """Whether vLLM can draw from base model plus adapter as they are."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return not any(config.get(key) for key in NOT_SERVED)


def merge(opponent: OpponentSpec, adapter: Path, target: Path, *, tokenizer: Path | None = None) -> None:
    """Write a base model, unquantised, with an adapter merged into it; Axolotl's own merge.

    Args:
        opponent: whose base model.
        adapter: the adapter's directory.
        target: where the model goes, whole.
        tokenizer: a directory whose tokenizer it gets; None: the base model's.

    Raises:
        SpinError: what would be written is not base model plus adapter.
    """
    import torch
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    if opponent.gptq:
        raise SpinError("gptq: vLLM cannot serve this adapter, and nothing can be merged into a GPTQ model")
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
    """Axolotl 0.19 goes through the tensors of the base model and passes over what it finds no tensor for: an
    embedding's LoRA, and all that concerns a head which is the embedding.

    Raises:
        SpinError: the result would not be base model plus adapter.
    """
    from transformers import AutoConfig

    tied = AutoConfig.from_pretrained(opponent.base_model, **opponent.hub).get_text_config().tie_word_embeddings
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    names = [name for file in check_weights(adapter, "adapter_model") for name in check_safetensors(file)]
    lost = {
        "the LoRA of an embedding": any("lora_embedding" in name for name in names),
        "the LoRA of a head that is the embedding": tied and any("lm_head.lora" in name for name in names),
        "a saved embedding or head, which are one here (without peft_ensure_weight_tying)": tied
        and not settings.get("ensure_weight_tying")
        and bool({"lm_head", "embed_tokens"} & set(settings.get("modules_to_save") or ())),
    }
    for what, is_lost in lost.items():
        if is_lost:
            raise SpinError(f"{adapter} cannot be merged into its base model: {what} would be lost")
