"""Accuracy and KL of a model on the tiny task, reported by `make.py` and `evaluate.py`.

Separate from `evaluate.py` because axolotl imports a package of that name: code that needs this directory on `sys.path`
should append it and import from here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from task import IN_DOMAIN, Item
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SAMPLES_PER_PROMPT = 2
SAMPLING_SEED = 1234
# A right answer has nine tokens including the end token; three more reveal answers that are too long.
MAX_NEW_TOKENS = 12


def read_heldout(path: Path) -> list[Item]:
    """Read the items of a `heldout.jsonl` written by `make.py`."""
    return [Item(**json.loads(line)) for line in path.read_text().splitlines()]


def evaluate_model(path: Path, heldout: Sequence[Item]) -> dict[str, float]:
    """Return `in_domain` and `out_of_domain` accuracy in percent and `kl` in nats of the model at `path`.

    Accuracy is the exact match of complete answers sampled at temperature 1. The data is deterministic, so
    KL(p_data || p_theta) is -log p_theta(answer, end token | prompt), averaged over all prompts.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return {
        **accuracy(model, tokenizer, heldout, sampled=True),
        "kl": float(answer_nll(model, tokenizer, heldout).mean()),
    }


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Item],
    sampled: bool,
) -> dict[str, float]:
    """Return the percentage of exactly right answers by domain; greedy unless `sampled`."""
    prompts, answers = _encode(tokenizer, heldout)
    samples = SAMPLES_PER_PROMPT if sampled else 1
    completions = _complete(model, tokenizer, prompts, samples)
    width = answers.shape[1]
    # `generate` pads after the end token, so comparing the first `width` tokens is enough.
    right = (completions[:, :width] == answers.repeat_interleave(samples, dim=0)).all(dim=1)
    inside = torch.tensor([item.op in IN_DOMAIN for item in heldout]).repeat_interleave(samples)
    return {
        "in_domain": 100 * int(right[inside].sum()) / int(inside.sum()),
        "out_of_domain": 100 * int(right[~inside].sum()) / int((~inside).sum()),
    }


def answer_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: Sequence[Item]) -> torch.Tensor:
    """Return -log p(answer, end token | prompt) of each item in nats [items]."""
    return -answer_log_probs(model, tokenizer, heldout)[0]


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: Sequence[Item]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(answer, end token | prompt) of each item [items], and whether greedy decoding gives it [items]."""
    prompts, answers = _encode(tokenizer, heldout)
    logits = model(torch.cat([prompts, answers], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    log_probs = logits.log_softmax(dim=-1).gather(2, answers.unsqueeze(2)).squeeze(2).sum(dim=1)
    return log_probs, (logits.argmax(dim=-1) == answers).all(dim=1)


def _encode(tokenizer: PreTrainedTokenizerBase, heldout: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts from the chat template and answers with end token, each of uniform length."""
    chats = [[{"role": "user", "content": item.prompt}] for item in heldout]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    answers = tokenizer([item.answer + tokenizer.eos_token for item in heldout], add_special_tokens=False)
    return torch.tensor(prompts), torch.tensor(answers["input_ids"])


@torch.no_grad()
def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: torch.Tensor, samples: int
) -> torch.Tensor:
    """Return completions [prompts * samples, up to MAX_NEW_TOKENS], sampled if `samples` > 1."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if samples > 1 else {"do_sample": False}),
    )
    prompts = prompts.repeat_interleave(samples, dim=0)
    with torch.random.fork_rng():
        torch.manual_seed(SAMPLING_SEED)
        sequences = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    return sequences[:, prompts.shape[1] :]
