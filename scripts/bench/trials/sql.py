"""Questions about geography to SQL; an answer is right if it returns the reference's rows."""

from pathlib import Path
from statistics import fmean
from typing import Any

from trials.answer import answers
from trials.chat_task import END, ChatTask
from trials.task import Scores

from spin_plugin.judge import sqlite

SAMPLES = {"dev": 16, "test": 8}


class Sql(ChatTask):
    """`inputs` also holds geography.sqlite."""

    name = "sql"
    files = ("base", "train.jsonl", "dev.jsonl", "test.jsonl", "geography.sqlite")
    compared = ("sampled", "greedy")

    @property
    def judge(self) -> dict[str, Any]:
        return {"function": "sqlite", "kwargs": {"database": str(self.database)}}

    @property
    def database(self) -> Path:
        return self.inputs / "geography.sqlite"

    def score(self, model: Path, split: str) -> Scores:
        """Return execution accuracy of each question: greedy, and the mean of samples at temperature 1."""
        rows = self.read(split)
        found: Scores = {"greedy": [], "sampled": []}
        for row, texts in zip(rows, answers(model, rows, SAMPLES[split], self.seed, END, self.directory), strict=True):
            real = [row[-1]["content"]] * len(texts)
            greedy, *samples = sqlite([], real, texts, database=str(self.database))
            found["greedy"].append(greedy)
            found["sampled"].append(fmean(samples))
        return found
