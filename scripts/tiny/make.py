"""Create the tiny task's base model and data; takes about two minutes on two cores, needs no network.

    python scripts/tiny/make.py --out outputs/tiny [--seed 0]

The base model learns all five operations from answers most of which are damaged: its greedy answers are right, its
sampled ones mostly wrong. SFT and self-play then close this gap.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from measure import accuracy
from rich.console import Console
from rich.progress import track
from task import IN_DOMAIN, LETTERS, OPERATIONS, Item, damaged, sample_heldout, sample_items
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

SPECIAL_TOKENS = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
IGNORED_LABEL = -100
MARKER = "made.json"
# The summation order depends on the number of threads and changes the weights, so it is fixed.
THREADS = 2


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the output; stored with it, so that a rerun can recognize it."""

    seed: int = 0
    sft_pairs: int = 2000
    heldout_per_domain: int = 500
    damaged_share: float = 0.55
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 100


def make(out: Path, recipe: Recipe, console: Console) -> None:
    """Write `base/`, `data/` and the marker to `out` atomically, unless they exist.

    Raises:
        ValueError: `out` contains anything else.
    """
    if _is_made(out, recipe):
        console.print(f"{out} already exists with seed {recipe.seed}: nothing to do.")
        return
    building = out.with_name(f".{out.name}.building-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        result = _build(building, recipe, console)
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    console.print(f"{out}: {result}")


def _is_made(out: Path, recipe: Recipe) -> bool:
    if not out.exists() or not any(out.iterdir()):
        return False
    marker = out / MARKER
    if marker.exists() and json.loads(marker.read_text()) == asdict(recipe):
        return True
    raise ValueError(
        f"{out} has other contents, or was created with another seed or recipe; remove it, or pass another "
        "directory with --out"
    )


def _build(directory: Path, recipe: Recipe, console: Console) -> str:
    rng = Random(recipe.seed)
    heldout = sample_heldout(recipe.heldout_per_domain, rng)
    excluded = frozenset(item.prompt for item in heldout)
    pairs = sample_items(IN_DOMAIN, recipe.sft_pairs, rng, excluded)
    write_jsonl(directory / "data" / "sft.jsonl", ({"messages": messages(item)} for item in pairs))
    write_jsonl(directory / "data" / "heldout.jsonl", (item._asdict() for item in heldout))

    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer)
    train_base(model, tokenizer, recipe, rng, excluded, console)
    model.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    (directory / MARKER).write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    greedy = accuracy(model, tokenizer, heldout, sampled=False)
    sampled = accuracy(model, tokenizer, heldout, sampled=True)
    return "base model right in/out of domain: " + ", ".join(
        f"{name} {result['in_domain']:.1f}%/{result['out_of_domain']:.1f}%"
        for name, result in (("greedy", greedy), ("sampled", sampled))
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character, special tokens for the turns, and a chat template."""
    tokens = (*SPECIAL_TOKENS, *OPERATIONS, *LETTERS)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama with 0.34M parameters; vLLM's CPU attention needs head size 32."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=128,
        bos_token_id=None,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    rng: Random,
    excluded: Collection[str],
    console: Console,
) -> None:
    """Train on new items of all operations in every step, on the answer tokens only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    model.train()
    for _ in track(range(recipe.steps), "base model", console=console, transient=True, disable=not console.is_terminal):
        items = sample_items(OPERATIONS, recipe.batch_size, rng, excluded)
        noisy = [
            item._replace(answer=damaged(item.answer, rng)) if rng.random() < recipe.damaged_share else item
            for item in items
        ]
        input_ids, labels = encode_batch(tokenizer, noisy)
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def encode_batch(tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and labels [items, tokens]; all items have the same length.

    Looking up the ids is much faster than rendering the chat template; each batch's first item asserts that both agree.
    """
    vocabulary = tokenizer.get_vocab()
    rows = [_token_ids(vocabulary, item) for item in items]
    assert rows[0] == tokenizer.apply_chat_template(messages(items[0]), return_dict=False)
    input_ids = torch.tensor(rows)
    labels = input_ids.clone()
    labels[:, : rows[0].index(vocabulary["<assistant>"]) + 1] = IGNORED_LABEL
    return input_ids, labels


def _token_ids(vocabulary: dict[str, int], item: Item) -> list[int]:
    tokens = ("<user>", *item.prompt, "<end>", "<assistant>", *item.answer, "<end>")
    return [vocabulary[token] for token in tokens]


def messages(item: Item) -> list[dict[str, str]]:
    """Return an item as a chat."""
    return [
        {"role": "user", "content": item.prompt},
        {"role": "assistant", "content": item.answer},
    ]


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows to a file, whose directory is created."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    try:
        make(arguments.out, Recipe(seed=arguments.seed), Console(soft_wrap=True))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
