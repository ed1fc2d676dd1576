"""How likely a chat model's own answers to everyday questions still are: what it has forgotten."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trials.answer import answers

from spin_plugin.run.atomic import write_atomically

QUESTIONS = ("What is {}?", "Explain {} to a child in two sentences.", "Why does {} matter?", "Name a fact about {}.")
TOPICS = ("gravity", "the moon", "bread", "the internet", "a volcano", "music", "honesty", "money", "sleep", "a bridge")


def chat_rows(base: Path, end: str, file: Path) -> list[list[dict[str, str]]]:
    """Return chats: each question, and the chat model's answer sampled at temperature 1. Made once, kept in `file`."""
    with FileLock(f"{file}.lock"):
        if not file.exists():
            asked = [
                [{"role": "user", "content": question.format(topic)}, {"role": "assistant", "content": ""}]
                for question, topic in product(QUESTIONS, TOPICS)
            ]
            found = answers(base, asked, 1, 0, end, file.parent)
            texts = (text for _, text in found)
            rows = [[row[0], {"role": "assistant", "content": text}] for row, text in zip(asked, texts, strict=True)]
            write_atomically(file, json.dumps(rows))
    loaded: list[list[dict[str, str]]] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def chat_log_prob(model: Path, rows: list[list[dict[str, str]]]) -> float:
    """Return the mean log-prob of the answers' tokens in nats per token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scored = [token_log_probs(policy, tokenizer, row)[0] for row in rows]
    return float(torch.cat(scored).mean())


@torch.no_grad()
def token_log_probs(policy: Any, tokenizer: Any, row: list[dict[str, str]], end: str = "") -> tuple[Tensor, bool]:
    """Return the log-prob of each token of a chat's last message, and whether greedy decoding gives the message.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        row: the chat.
        end: a token that is scored after the message.
    """
    prompt = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False)
    answer = torch.tensor(tokenizer(row[-1]["content"] + end, add_special_tokens=False)["input_ids"])
    ids = torch.cat([torch.tensor(prompt), answer])[None]
    logps = policy(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    return logps.gather(1, answer[:, None])[:, 0], bool((logps.argmax(dim=1) == answer).all())
