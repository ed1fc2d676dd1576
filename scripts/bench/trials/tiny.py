"""The tiny task: five operations on eight letters, two of them in the SFT data (scripts/tiny/task.py)."""

import random
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trials.task import Scores, Sweep, Task
from trials.unit import ROOT, once, run, train

sys.path.append(str(ROOT / "scripts/tiny"))

from measure import answer_log_probs, read_heldout
from task import IN_DOMAIN, Item, sample_heldout

DEV_PER_DOMAIN = 500
NAMES = {"<": "copy", ">": "reverse", "^": "sort", "*": "rotate", "~": "swap"}


class Tiny(Task):
    """Everything has the seed: base model, data, order, sampling."""

    name = "tiny"
    without = ("sdft", "sdft-high")  # the teacher is told the answer in words, and the model knows none
    compared = ("out_of_domain", "in_domain")
    sweep = Sweep(learning_rates=(3e-5, 1e-4, 3e-4), epochs=(4, 12, 36), checkpoints=8)
    dpo_sweep = Sweep(learning_rates=(1e-5, 5e-5), checkpoints=6)

    @cached_property
    def start(self) -> Path:
        made = self.directory / "made"
        with once(self.directory / "making", f"seed {self.seed}") as needed:
            if needed:
                script = ROOT / "scripts/tiny/make.py"
                run([sys.executable, script, "--out", made, "--seed", str(self.seed)], self.directory / "making/log")
        return train(self.directory / "start", self._read("sft-tiny.yml") | {"base_model": str(made / "base")})

    @property
    def data(self) -> Path:
        return self.directory / "made/data/sft.jsonl"

    @property
    def sft(self) -> dict[str, Any]:
        # by default Axolotl pads to multiples of 64, three times the length of a row
        return self._read("sft-tiny.yml") | {"base_model": str(self.start), "pad_to_multiple_of": 8}

    @property
    def spin(self) -> dict[str, Any]:
        config = self._read("spin-tiny.yml") | {"base_model": str(self.start)}
        config["spin"]["iterations"] = 6
        return config

    @property
    def sdft(self) -> list[str]:
        raise NotImplementedError

    @property
    def judge(self) -> dict[str, Any]:
        return {"function": "exact"}

    def _read(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((ROOT / "yaml_examples" / name).read_text(encoding="utf-8"))
        config["datasets"][0]["path"] = str(self.data)
        return config | {"seed": self.seed, "dataset_prepared_path": str(self.directory / "prepared")}

    @cached_property
    def splits(self) -> dict[str, list[Item]]:
        """Test and dev prompts; the SFT data holds none of them."""
        test = read_heldout(self.directory / "made/data/heldout.jsonl")
        seen = {item.prompt for item in test} | {row[0]["content"] for row in self.rows}
        dev = sample_heldout(DEV_PER_DOMAIN, random.Random(10_000 + self.seed))
        return {"test": test, "dev": [item for item in dev if item.prompt not in seen]}

    def score(self, model: Path, split: str) -> Scores:
        """Return the probability of each prompt's only right answer, and whether greedy decoding gives it, by domain.

        The probability is the expected exact match at temperature 1, without the noise of sampling.
        """
        items = self.splits[split]
        tokenizer = AutoTokenizer.from_pretrained(model)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        logps, greedy = answer_log_probs(policy, tokenizer, items)
        found: Scores = {}
        for domain, inside in (("in_domain", True), ("out_of_domain", False)):
            chosen = [number for number, item in enumerate(items) if (item.op in IN_DOMAIN) == inside]
            found[domain] = [float(logps[number].exp()) for number in chosen]
            found[f"greedy_{domain}"] = [float(greedy[number]) for number in chosen]
        for op, name in NAMES.items():
            found[name] = [float(logps[number].exp()) for number, item in enumerate(items) if item.op == op]
        return found
