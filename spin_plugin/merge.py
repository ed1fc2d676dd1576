"""Base model plus adapter as one checkpoint: where vLLM cannot serve the adapter, and for `adapter_chain: merge`."""

import json
from pathlib import Path
from typing import Any

from spin_plugin.messages import say
from spin_plugin.run import make_folder_whole

# Of peft's adapter_config.json: what vLLM's LoRA knows nothing of. Versions before 0.32 would pass over a rank or an
# alpha of single modules in silence, and draw from another opponent.
NOT_SERVED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")


def served_by_vllm(adapter: Path) -> bool:
    """Whether vLLM can draw from base model plus adapter as they are."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return not any(config.get(key) for key in NOT_SERVED)


def merge(cfg: Any, adapter: Path, target: Path) -> None:
    """Write the base model of `cfg` with an adapter merged into it, one shard in memory at a time.

    Axolotl's own merge: with a base that training quantises, what is merged into is what training saw.
    """
    import torch
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    say(f"merging {adapter} into its base model")

    def fill(folder: Path) -> None:
        merge_lora_sharded_efficient(
            base_model_path=cfg.base_model,
            lora_adapter_path=adapter,
            output_path=folder,
            device="cuda" if torch.cuda.is_available() else "cpu",
            simulate_nf4=bool(cfg.load_in_4bit),
            trust_remote_code=bool(cfg.trust_remote_code),
            revision=cfg.revision_of_model,
        )

    make_folder_whole(target, fill)
