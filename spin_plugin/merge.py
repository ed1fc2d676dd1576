"""Base model plus adapter as one checkpoint: where vLLM cannot serve the adapter, and for `adapter_chain: merge`."""

import json
import shutil
from pathlib import Path
from typing import Any

from spin_plugin.checkpoint import check_safetensors, check_weights
from spin_plugin.messages import SpinError, say
from spin_plugin.run import make_folder_whole
from spin_plugin.weights import model_class

# Of peft's adapter_config.json: what vLLM's LoRA knows nothing of. Versions before 0.32 would pass over a rank or an
# alpha of single modules in silence, and draw from another opponent.
NOT_SERVED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
             "*.model", "tekken.json")  # fmt: skip
# Nats a token that rounding explains, with weights of 32 bits and of 16.
EXACT, ROUNDED = 1e-3, 0.1


def served_by_vllm(adapter: Path) -> bool:
    """Whether vLLM can draw from base model plus adapter as they are."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return not any(config.get(key) for key in NOT_SERVED)


def merge(cfg: Any, adapter: Path, target: Path, *, tokenizer: Path | None = None) -> None:
    """Write the base model of `cfg`, unquantised, with an adapter merged into it; Axolotl's own merge.

    Args:
        cfg: Axolotl's configuration.
        adapter: the adapter's directory.
        target: where the model goes, whole.
        tokenizer: a directory whose tokenizer it gets; None: the base model's.

    Raises:
        SpinError: the model that was written is not base model plus adapter.
    """
    import torch
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    if cfg.gptq:
        raise SpinError("gptq: vLLM cannot serve this adapter, and nothing can be merged into a GPTQ model")
    say(f"merging {adapter} into its base model")

    def fill(folder: Path) -> None:
        merge_lora_sharded_efficient(
            base_model_path=cfg.base_model,
            lora_adapter_path=adapter,
            output_path=folder,
            device="cuda" if torch.cuda.is_available() else "cpu",
            trust_remote_code=bool(cfg.trust_remote_code),
            revision=cfg.revision_of_model,
        )
        for file in (file for pattern in TOKENIZER if tokenizer for file in tokenizer.glob(pattern)):
            shutil.copy(file, folder)
        _require_merged(cfg, adapter, folder)

    make_folder_whole(target, fill)


def _require_merged(cfg: Any, adapter: Path, merged: Path) -> None:
    """Compare base plus adapter with what was written on a few tokens: Axolotl 0.19 passes over what it finds no tensor
    for (an embedding's LoRA, a head that is the embedding).

    Raises:
        SpinError: the written model is another one.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    def load(place: str, **hub: Any) -> Any:
        config = AutoConfig.from_pretrained(place, trust_remote_code=bool(cfg.trust_remote_code), **hub)
        auto = model_class(config)
        return auto.from_pretrained(place, dtype="auto", trust_remote_code=bool(cfg.trust_remote_code), **hub).eval()

    def logps(model: Any) -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits[..., :vocabulary].float().log_softmax(-1)

    model = load(cfg.base_model, revision=cfg.revision_of_model)
    if getattr(model.config, "quantization_config", None):  # Axolotl looks at these formats itself
        return
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    if (rows := _embedding_rows(adapter)) > vocabulary:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        alone, adapted = logps(model), logps(model := PeftModel.from_pretrained(model, str(adapter)).eval())
        rounding = EXACT if alone.dtype == model.dtype else ROUNDED
        del model
        error = (logps(load(str(merged))) - adapted).abs().mean().item()
    effect = (alone - adapted).abs().mean().item()
    if error > rounding and error > effect / 2:
        raise SpinError(
            f"{adapter} cannot be merged: the result is {error:.2g} nats a token away from base model plus adapter, "
            f"whose own effect is {effect:.2g}. Leave embeddings and head out of lora_target_modules and "
            "lora_modules_to_save, or train them with the full model"
        )


def _embedding_rows(adapter: Path) -> int:
    """Rows of the embedding that an adapter brings along, 0 where it brings none."""
    headers = [check_safetensors(file) for file in check_weights(adapter, "adapter_model")]
    ends = ("embed_tokens.weight", "lm_head.weight")
    return max((h[name]["shape"][0] for h in headers for name in h if name.endswith(ends)), default=0)
