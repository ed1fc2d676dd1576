"""The SDFT baseline counts the compute that its model really does, and keeps to its limit."""

import functools
import importlib
import random
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import byte_tokenizer, make_model
from transformers import LlamaForCausalLM

TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def sdft(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")
    return importlib.import_module("trials.sdft")


def padded(lengths: list[int], *, left: bool) -> torch.Tensor:
    """Return a mask for rows of these lengths."""
    positions = torch.arange(max(lengths)).expand(len(lengths), -1)
    mask = positions < torch.tensor(lengths)[:, None]
    return (mask.flip(1) if left else mask).long()


def test_compute_of_a_batch_is_that_of_its_tokens_one_by_one(sdft: Any) -> None:
    draw = random.Random(0)
    prompts, completions, teacher_prompts = ([draw.randint(1, 9) for _ in range(5)] for _ in range(3))
    expected = 0
    for prompt, completion, teacher_prompt in zip(prompts, completions, teacher_prompts, strict=True):
        expected += sum(1 + 3 for _ in range(prompt))  # prefilled, trained on
        expected += sum(1 + 3 + 1 for _ in range(completion))  # generated, trained on, scored
        expected += teacher_prompt
    completion_mask = padded(completions, left=False)
    teacher = torch.cat([padded(teacher_prompts, left=True), completion_mask], dim=1)
    batch = {"prompt_mask": padded(prompts, left=True), "completion_mask": completion_mask}
    assert sdft.batch_compute(batch | {"teacher_attention_mask": teacher}) == expected


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compute of each step, from what the model is called with; a step starts with generation."""
    found: list[int] = []
    forward, generate = LlamaForCausalLM.forward, LlamaForCausalLM.generate
    end = byte_tokenizer().eos_token_id

    @functools.wraps(generate)
    def counted_generate(self: Any, **arguments: Any) -> torch.Tensor:
        output: torch.Tensor = generate(self, **arguments)
        prompt = arguments["input_ids"].shape[1]
        answers = [row[prompt:].tolist() for row in output]
        lengths = [answer.index(end) + 1 if end in answer else len(answer) for answer in answers]
        found.append(int(arguments["attention_mask"].sum()) + sum(lengths))
        return output

    @functools.wraps(forward)
    def counted_forward(self: Any, *args: Any, **arguments: Any) -> Any:
        if arguments.get("past_key_values") is None:
            found[-1] += int(arguments["attention_mask"].sum()) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, *args, **arguments)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counted_generate)
    monkeypatch.setattr(LlamaForCausalLM, "forward", counted_forward)
    return found


def test_a_run_saves_the_last_model_up_to_each_point(
    sdft: Any, steps: list[int], chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, limit = make_model(tmp_path / "model"), 30_000
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    options = f"--learning-rate 1e-3 --limit {limit} --checkpoints 3 --batch-size 4"
    command = ["sdft.py", str(model), str(chat_data), str(tmp_path / "out"), *options.split(), "--max-completion", "40"]
    monkeypatch.setattr(sys, "argv", command)
    sdft.main()
    so_far = list(accumulate(steps, initial=0))
    assert so_far[-2] <= limit < so_far[-1]
    expected = {max(value for value in so_far if value <= point) for point in (10_000, 20_000, 30_000)}
    assert {int(path.name.removeprefix("compute-")) for path in (tmp_path / "out").iterdir()} == expected
    first, last = (LlamaForCausalLM.from_pretrained(path) for path in (model, tmp_path / f"out/compute-{so_far[-2]}"))
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight)
