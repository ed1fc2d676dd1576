"""SCAN: commands to actions (Lake & Baroni 2018), with commands unlike those of the SFT data."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trials.chat import token_log_probs
from trials.chat_task import END, ChatTask
from trials.task import Scores


class Scan(ChatTask):
    """`inputs` is made by scan_data.py, apart from base/."""

    name = "scan"
    compared = ("out_of_domain", "in_domain")
    files = (
        "base",
        "train.jsonl",
        "dev-in_domain.jsonl",
        "dev-out_of_domain.jsonl",
        "test-in_domain.jsonl",
        "test-out_of_domain.jsonl",
    )
    sequence_len = 320

    @property
    def judge(self) -> dict[str, Any]:
        return {"function": "exact"}

    def score(self, model: Path, split: str) -> Scores:
        """Return the probability of each command's only right answer, and whether greedy decoding gives it.

        The probability is the expected exact match at temperature 1, without the noise of sampling.
        """
        tokenizer = AutoTokenizer.from_pretrained(model)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        found: Scores = {}
        for domain in self.compared:
            scored = [token_log_probs(policy, tokenizer, row, END) for row in self.read(f"{split}-{domain}")]
            found[domain] = [float(logps.sum().exp()) for logps, _ in scored]
            found[f"greedy_{domain}"] = [float(greedy) for _, greedy in scored]
        return found
