"""Tiny real models, tokenizers and datasets for the tests, generated from a seed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Special tokens of Axolotl's built-in chat templates that the tests use; their ids follow the 256 bytes.
SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>",
    "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
VOCABULARY = 256 + len(SPECIAL)

# Arguments for a tiny model of any architecture. vLLM's CPU attention needs head size 32 or more.
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}

# Configuration keys for FSDP2 with two processes, and for a LoRA adapter on all linear layers.
FSDP2: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "offload_params": False,
        "cpu_ram_efficient_loading": False,
    },
}
LORA: dict[str, Any] = {
    "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "learning_rate": 1e-2,
}  # fmt: skip


def zero(stage: int, *, bf16: bool = False) -> dict[str, Any]:
    """Return the configuration keys for DeepSpeed ZeRO."""
    automatic = (
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    )
    optimization = {"stage": stage, "overlap_comm": False, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "deepspeed": {
            "zero_optimization": optimization,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            **dict.fromkeys(automatic, "auto"),
        }
    }


def byte_tokenizer(eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte and the special tokens of several chat templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )


def make_model(path: Path, architecture: str = "llama", *, eos: str = "</s>", seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of an architecture with the byte tokenizer and return `path`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(SMALL | overrides))
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # sharper distributions than a fresh model, so that responses differ in length and content
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    model.save_pretrained(path)
    byte_tokenizer(eos).save_pretrained(path)
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int, *, turns: int = 1) -> list[dict[str, Any]]:
    """Return `count` conversations of `turns` user and assistant turns."""
    return [
        {
            "messages": [
                message
                for turn in range(turns)
                for message in (
                    {"role": "user", "content": f"count {number + turn}"},
                    {"role": "assistant", "content": f"{number + turn} comes before {number + turn + 1}"},
                )
            ]
        }
        for number in range(count)
    ]


def spin_config(directory: Path, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Return a SPIN configuration for the tiny models: a few steps on a CPU. A change to None removes the key."""
    config = {
        "base_model": str(model),
        "output_dir": str(directory / "run"),
        "plugins": ["spin_plugin.SpinPlugin"],
        "rl": "spin",
        "spin": {
            "iterations": 2,
            "generation": {"max_tokens": 12, "vllm_kwargs": {"kv_cache_memory_bytes": 64 << 20}},
        },
        "vllm": {"enforce_eager": True},
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "chatml",
        "eot_tokens": ["<|im_end|>"],
        "sequence_len": 160,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "seed": 7,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "val_set_size": 0,
        "logging_steps": 1,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def write_config(directory: Path, config: Mapping[str, Any], name: str = "config.yml") -> Path:
    path = directory / name
    path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    return path
