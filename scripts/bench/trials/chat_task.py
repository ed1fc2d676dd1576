"""What the tasks of a small chat model have in common: SmolLM2-135M-Instruct, or any model with its chat template."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml
from trials.chat import chat_log_prob, chat_rows
from trials.sweep import candidates
from trials.task import Sweep, Task, read_chats
from trials.unit import Found, once

END = "<|im_end|>"
COMMON: dict[str, Any] = {
    "chat_template": "tokenizer_default",
    "special_tokens": {"eos_token": END, "pad_token": END},
    "val_set_size": 0,
    "sequence_len": 256,
    "micro_batch_size": 8,  # 16 took 8 GB, for the logits of 49,152 tokens
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "optimizer": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": True,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "logging_steps": 1,
    "save_strategy": "epoch",
    "save_total_limit": 1,
}
"""What all configurations have in common."""


class ChatTask(Task):
    """The seed is that of data order and sampling; the start is the same for all seeds.

    `inputs` holds the chat rows train.jsonl, dev.jsonl and test.jsonl, and base/, the chat model.
    """

    sweep = Sweep(learning_rates=(1e-5, 3e-5), epochs=(1, 3), checkpoints=2)
    dpo_sweep = Sweep(learning_rates=(1e-5,), checkpoints=4)
    sdft_sweep = Sweep(learning_rates=(1e-5,), checkpoints=4)
    sequence_len = COMMON["sequence_len"]
    first_sweep = Sweep(learning_rates=(5e-5, 1e-4), epochs=(4, 10), checkpoints=2)
    """The sweep from the chat model that makes the start."""

    @property
    def data(self) -> Path:
        return self.inputs / "train.jsonl"

    def read(self, split: str) -> list[list[dict[str, str]]]:
        """Return the chats of a split."""
        return read_chats(self.inputs / f"{split}.jsonl")

    @cached_property
    def start(self) -> Path:
        directory = self.directory.parent / "start"
        first = type(self)(directory, 0, self.inputs)  # the same whichever seed comes first
        config = first._common(self.inputs / "base") | self._fast
        with once(directory, yaml.safe_dump(config)) as needed:
            if needed:
                sweep = self.first_sweep
                # only the run that was the best; on sql, another learning rate was tried once the start was there
                if known := [one for one in self.known if one["learning_rate"] in sweep.learning_rates]:
                    best = self._best(known)
                    sweep = replace(sweep, learning_rates=(best["learning_rate"],), epochs=(best["epochs"],))
                found = list(candidates(first, directory, sweep, config))
                best = self._best(found)
                shutil.copytree(best["model"], directory / "model", dirs_exist_ok=True)
                (directory / "sweep.json").write_text(json.dumps(found), encoding="utf-8")
        return directory / "model"

    def _best(self, found: Sequence[Found]) -> Found:
        return max(found, key=lambda candidate: candidate["dev"][self.compared[0]])

    def start_sweep(self) -> list[Found]:
        found: list[Found] = json.loads((self.start.parent / "sweep.json").read_text(encoding="utf-8"))
        return [{name: value for name, value in candidate.items() if name != "model"} for candidate in found]

    @property
    def sft(self) -> dict[str, Any]:
        return self._common(self.start) | self._fast

    @property
    def spin(self) -> dict[str, Any]:
        own = {"rl": "spin", "num_epochs": 1, "learning_rate": 1e-5}
        return self._common(self.start) | own | {"spin": {"iterations": 2, "beta": 0.3}}

    @property
    def sdft(self) -> list[str]:
        return ["--batch-size", "16", "--max-completion", str(self.sequence_len), "--stop", END, "--bf16"]

    # by default Axolotl pads rows of any length to multiples of 64: twice the tokens. The plugin lets a CPU use bf16;
    # compensation moves bf16 weights at small learning rates. SPIN has all three by itself.
    _fast: ClassVar = {
        "group_by_length": True,
        "pad_to_multiple_of": 8,
        "optimizer": "optimi_adamw",
        "plugins": ["scripts.bench.trials.bf16_on_cpu.Bf16OnCpu"],
    }

    def _common(self, base: Path) -> dict[str, Any]:
        return COMMON | {
            "base_model": str(base),
            "datasets": [{"path": str(self.data), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": str(self.directory.parent / "prepared"),
            "sequence_len": self.sequence_len,
            "seed": self.seed,
        }

    def other(self, model: Path) -> dict[str, float]:
        """Return the likelihood of the chat model's own answers to everyday questions, in nats per token."""
        rows = chat_rows(self.inputs / "base", END, self.directory.parent / "chat.json")
        return {"chat": round(chat_log_prob(model, rows), 4)}
