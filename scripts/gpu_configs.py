"""Configurations of `gpu_check.sh`: one tiny model, one for each way to train and to draw responses.

python scripts/gpu_configs.py FOLDER      # FOLDER/WAY.yml, and FOLDER/ways with a line `WAY PROCESSES` for each
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import FSDP2, chat_rows, make_model, spin_config, write_config, write_jsonl

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
BF16, FP16 = {"bf16": True}, {"fp16": True}


def zero(stage: int) -> dict[str, Any]:
    automatic = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": "auto",
            **dict.fromkeys(automatic, "auto"),
        }
    }


def drawn(**generation: Any) -> dict[str, Any]:
    return {"spin": {"generation": generation}}


# Processes, and changes to the configuration. Without another word one engine for each GPU draws the responses.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, BF16),
    "ddp": (2, BF16),
    "fsdp2": (2, BF16 | FSDP2),
    "zero2": (2, BF16 | zero(2)),
    "zero3": (2, BF16 | zero(3)),
    "lora": (1, BF16 | LORA),
    "lora-ddp": (2, BF16 | LORA),
    "lora-fsdp2": (2, BF16 | LORA | FSDP2),
    "lora-zero3": (2, BF16 | LORA | zero(3)),
    "lora-merge": (1, BF16 | LORA | {"spin": {"adapter_chain": "merge"}}),
    "dora": (1, BF16 | LORA | {"peft_use_dora": True}),
    "qlora": (1, BF16 | QLORA),
    "8bit": (1, BF16 | LORA | {"load_in_8bit": True}),
    "fp16": (1, FP16),
    "compile": (1, BF16 | {"torch_compile": True}),
    "checkpointing": (2, BF16 | {"gradient_checkpointing": True}),
    "padded": (1, BF16 | {"spin": {"shared_prefix": "off"}}),
    "one-engine": (1, BF16 | drawn(engines=1)),
    "two-engines": (1, BF16 | drawn(engines=2)),
    "tensor": (1, BF16 | drawn(tensor_parallel_size=2)),
    "ray": (1, BF16 | drawn(engine="ray", engines=2)),
}
ROWS = 600  # three files of requests, so that two engines have work


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(folder / "model", intermediate_size=128)
    data = write_jsonl(folder / "chat.jsonl", chat_rows(ROWS))
    for way, (processes, changes) in WAYS.items():
        own = {"output_dir": str(folder / way), "micro_batch_size": 32 // processes}
        config = spin_config(folder, model, data, **(own | {key: changes[key] for key in changes if key != "spin"}))
        config["spin"]["generation"].pop("vllm")  # that is for CPUs
        changed = changes.get("spin", {})
        config["spin"]["generation"] |= changed.get("generation", {})
        config["spin"] |= {key: changed[key] for key in changed if key != "generation"}
        write_config(folder, config, f"{way}.yml")
    (folder / "ways").write_text("".join(f"{way} {processes}\n" for way, (processes, _) in WAYS.items()))


if __name__ == "__main__":
    main()
