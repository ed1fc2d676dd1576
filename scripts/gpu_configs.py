"""Configurations of `gpu_check.sh`: one tiny model, one for each way to train.

python scripts/gpu_configs.py FOLDER      # FOLDER/WAY.yml, and FOLDER/ways with a line `WAY PROCESSES` for each
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import FSDP2, chat_rows, make_model, spin_config, write_config, write_jsonl

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}


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


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp": (2, {}),
    "fsdp2": (2, FSDP2),
    "zero2": (2, zero(2)),
    "zero3": (2, zero(3)),
    "lora": (1, LORA),
    "lora-ddp": (2, LORA),
    "lora-fsdp2": (2, LORA | FSDP2),
    "qlora": (1, QLORA),
}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(folder / "model")
    data = write_jsonl(folder / "chat.jsonl", chat_rows(32))
    for way, (processes, changes) in WAYS.items():
        own = {"output_dir": str(folder / way), "bf16": True, "micro_batch_size": 4 // processes}
        write_config(folder, spin_config(folder, model, data, **(own | changes)), f"{way}.yml")
    (folder / "ways").write_text("".join(f"{way} {processes}\n" for way, (processes, _) in WAYS.items()))


if __name__ == "__main__":
    main()
