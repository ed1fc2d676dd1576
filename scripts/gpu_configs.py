"""Configurations of `gpu_check.sh`: one per way to train and to generate responses, with small models.

python scripts/gpu_configs.py DIRECTORY      # writes DIRECTORY/WAY.yml, and the models and data they use
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import FSDP2, chat_rows, make_model, spin_config, write_config, write_jsonl, zero

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
BF16, FP16 = {"bf16": True}, {"fp16": True}

# Architecture and changes to the tests' tiny model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("llama", {"intermediate_size": 128}),
    # four query heads per key head, like Llama 3, Mistral and Qwen3
    "grouped": ("llama", {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}),
    # one of the two layers has a sliding window; the cap is low enough to matter
    "soft-capped": ("gemma2", {"attn_logit_softcapping": 3.0, "sliding_window": 32}),
    # Llama 3.2 1B's shape: 17 GB at 14 bytes per parameter with RMSProp
    "1b": (
        "llama",
        {
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


class Way(NamedTuple):
    """One way to train and to generate responses, by default with one engine per GPU."""

    gpus: int
    """Minimum number of GPUs."""
    changes: dict[str, Any]
    """Changes to the tests' configuration."""
    processes: int = 1
    model: str = "tiny"
    pairs: int = 32
    """Pairs per step."""


# Sequences of the full 1,024 tokens: the random model never generates an end token.
REAL_SIZE = {"sequence_len": 1024, "gradient_checkpointing": True, "optimizer": "rmsprop", "learning_rate": 5e-7}

WAYS: dict[str, Way] = {
    "one": Way(1, BF16),
    "ddp": Way(2, BF16, 2),
    "fsdp2": Way(2, BF16 | FSDP2, 2),
    "zero2": Way(2, BF16 | zero(2, bf16=True), 2),
    "zero3": Way(2, BF16 | zero(3, bf16=True), 2),
    "lora": Way(1, BF16 | LORA),
    "lora-kernels": Way(1, BF16 | LORA | dict.fromkeys(KERNELS, True)),
    "lora-ddp": Way(2, BF16 | LORA, 2),
    "lora-fsdp2": Way(2, BF16 | LORA | FSDP2, 2),
    "lora-zero3": Way(2, BF16 | LORA | zero(3, bf16=True), 2),
    "lora-merge": Way(1, BF16 | LORA | {"spin": {"adapter_chain": "merge"}}),
    "dora": Way(1, BF16 | LORA | {"peft_use_dora": True}),
    "qlora": Way(1, BF16 | QLORA),
    "8bit": Way(1, BF16 | LORA | {"load_in_8bit": True}),
    "lora-fp16": Way(1, FP16 | LORA),
    "compile": Way(1, BF16 | {"torch_compile": True}),
    "checkpointing": Way(1, BF16 | {"gradient_checkpointing": True}),
    "padded": Way(1, BF16 | {"spin": {"shared_prefix": "off"}}),
    "beta-5": Way(1, BF16 | {"spin": {"beta": 5.0}}),  # the paper's last iteration, where rounding matters most
    "grouped": Way(1, BF16, model="grouped"),
    # SDPA, which the padded layout would use, ignores soft-capping
    "soft-capped": Way(1, BF16 | {"attn_implementation": "eager"}, model="soft-capped"),
    "real-size": Way(1, BF16 | REAL_SIZE, model="1b", pairs=8),
    # vLLM takes nearly all GPU memory while the training process holds a CUDA context
    "share": Way(1, BF16 | {"vllm": {"gpu_memory_utilization": 0.95}}),
    "one-engine": Way(1, BF16 | {"vllm": {"data_parallel_size": 1}}),
    "two-engines": Way(2, BF16 | {"vllm": {"data_parallel_size": 2}}),
    "tensor": Way(2, BF16 | {"vllm": {"tensor_parallel_size": 2}}),
    "ray": Way(2, BF16 | {"spin": {"generation": {"backend": "ray"}}, "vllm": {"data_parallel_size": 2}}),
}
ROWS = 600  # three shards, so that two engines have work
LONG_ROWS = 96  # 32 of them are held out


def long_rows(count: int) -> list[dict[str, Any]]:
    """Conversations with prompts of about 300 tokens and responses of about 500 (one token per byte)."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"tell me of {number} " * 20},
                {"role": "assistant", "content": f"{number} is a number " * 34},
            ]
        }
        for number in range(count)
    ]


def config_of(directory: Path, way: str) -> dict[str, Any]:
    """Return the configuration of a way, with model and data in `directory`."""
    chosen, large = WAYS[way], WAYS[way].model == "1b"
    changes, spin = dict(chosen.changes), dict(chosen.changes.get("spin", {}))
    changes.pop("spin", None)
    changes |= {
        "output_dir": str(directory / way),
        "micro_batch_size": chosen.pairs // chosen.processes,
    }
    data = directory / ("long.jsonl" if large else "chat.jsonl")
    config = spin_config(directory, directory / chosen.model, data, **({"vllm": None} | changes))
    generation = config["spin"]["generation"]
    generation.pop("vllm_kwargs")  # CPU settings
    if large:
        generation.pop("max_tokens")
    generation |= spin.pop("generation", {})
    config["spin"] |= spin
    return config


def make_model_of(directory: Path, way: str) -> None:
    """Create the model of a way if missing; the large one takes a minute and 5 GB."""
    architecture, changes = MODELS[WAYS[way].model]
    if not (directory / WAYS[way].model).is_dir():
        make_model(directory / WAYS[way].model, architecture, **changes)


def write(directory: Path) -> None:
    """Write every way's configuration and the data; models are created when their way runs."""
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "chat.jsonl", chat_rows(ROWS))
    write_jsonl(directory / "long.jsonl", long_rows(LONG_ROWS))
    for way in WAYS:
        write_config(directory, config_of(directory, way), f"{way}.yml")


def main() -> None:
    directory = Path(sys.argv[1]).resolve()
    write(directory)
    for way in WAYS:
        make_model_of(directory, way)


if __name__ == "__main__":
    main()
