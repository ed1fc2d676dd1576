"""Answers of a model to chat prompts, by vLLM: greedy, and samples at temperature 1."""

import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer
from trials.unit import ROOT, run


def answers(
    model: Path, rows: list[list[dict[str, str]]], samples: int, seed: int, end: str, log_directory: Path
) -> list[list[str]]:
    """Return for each chat row the greedy answer and then samples, without the end token.

    Args:
        model: directory of the model.
        rows: messages, the last one being the reference, which is not shown.
        samples: number of samples.
        seed: seed of the samples.
        end: the token that ends an answer.
        log_directory: where vLLM's log goes.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False) for row in rows]
    with tempfile.TemporaryDirectory() as temporary:
        asked, answered = Path(temporary, "prompts.json"), Path(temporary, "answers.json")
        asked.write_text(json.dumps(prompts), encoding="utf-8")
        script = [ROOT / ".venv-vllm/bin/python", ROOT / "scripts/bench/answers.py", model, asked, answered]
        stop = tokenizer.convert_tokens_to_ids(end)
        own = ["--samples", samples, "--seed", seed, "--stop", stop, "--dtype", "bfloat16"]
        run([*script, *map(str, own)], log_directory / "answers.log")
        found = json.loads(answered.read_text(encoding="utf-8"))
    return [[tokenizer.decode(answer) for answer in group] for group in found]
