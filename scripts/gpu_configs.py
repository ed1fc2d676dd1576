"""Configurations of `gpu_check.sh`: small models, one configuration for each way to train and to draw responses.

python scripts/gpu_configs.py FOLDER      # FOLDER/WAY.yml, and the models and data that they name
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

# Architecture and changes to the tiny model of the tests.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("llama", {"intermediate_size": 128}),
    # four query heads a key head, as Llama 3, Mistral and Qwen3 have them
    "grouped": ("llama", {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}),
    # of both layers one slides; a cap so low that it bends the products
    "soft-capped": ("gemma2", {"attn_logit_softcapping": 3.0, "sliding_window": 32}),
    # Llama 3.2 1B's shape: 14 bytes a parameter with RMSProp, 17 GB
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
    """One way to train and to draw responses. Without another word one engine for each GPU draws them."""

    gpus: int
    """How many it needs at least."""
    changes: dict[str, Any]
    """Of the configuration of the tests."""
    processes: int = 1
    model: str = "tiny"
    pairs: int = 32
    """In a step."""


# 1,024 tokens a sequence, drawn and trained in full: the random model never stops by itself.
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
    "beta-5": Way(1, BF16 | {"spin": {"beta": 5.0}}),  # the paper's last iteration, where rounding counts most
    "grouped": Way(1, BF16, model="grouped"),
    # SDPA, which the padded form would take, leaves the soft-capping out
    "soft-capped": Way(1, BF16 | {"attn_implementation": "eager"}, model="soft-capped"),
    "real-size": Way(1, BF16 | REAL_SIZE, model="1b", pairs=8),
    # vLLM takes nearly all of the GPU while the process that trains next holds its context there
    "share": Way(1, BF16 | {"vllm": {"gpu_memory_utilization": 0.95}}),
    "one-engine": Way(1, BF16 | {"vllm": {"data_parallel_size": 1}}),
    "two-engines": Way(2, BF16 | {"vllm": {"data_parallel_size": 2}}),
    "tensor": Way(2, BF16 | {"vllm": {"tensor_parallel_size": 2}}),
    "ray": Way(2, BF16 | {"spin": {"generation": {"backend": "ray"}}, "vllm": {"data_parallel_size": 2}}),
}
ROWS = 600  # three files of requests, so that two engines have work
LONG_ROWS = 64


def long_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of about 300 and 500 bytes, which are as many tokens."""
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
    """The configuration of a way, whose model and data lie in `directory`."""
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
    generation.pop("vllm_kwargs")  # that is for CPUs
    if large:
        generation.pop("max_tokens")
    generation |= spin.pop("generation", {})
    config["spin"] |= spin
    return config


def make_model_of(directory: Path, way: str) -> None:
    """Make the model of a way where it is not there yet; the large one takes a minute and 5 GB."""
    architecture, changes = MODELS[WAYS[way].model]
    if not (directory / WAYS[way].model).is_dir():
        make_model(directory / WAYS[way].model, architecture, **changes)


def write(directory: Path) -> None:
    """Every way's configuration and the data; models are made when their way is played."""
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
