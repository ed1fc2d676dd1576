"""The pairs, models and compared implementations ("sides") of the step benchmark. See step.py."""

import argparse
import copy
import math
import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from spin_plugin.model.attention import enable
from spin_plugin.model.forward import install, logps
from spin_plugin.model.layout import Pair, groups_of, padded_batch, row_spans, sequences_of, shared_prefix_batch
from spin_plugin.objective.losses import Objective, spin_terms

# Axolotl's allocator: without it, micro-batches of other lengths make torch free and allocate blocks in most steps.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

MEDIANS, SIGMA = (120, 245, 200), 0.6  # prompt, real, synthetic
LONGEST_PROMPT, LONGEST = 512, 1024  # TRL truncates at 1024 by default, too
PAD, EOS = 0, 1
BETA = 0.1

Step = list[tuple[float, Callable[[], None]]]
"""Parts of a step, each with the weight of its time."""
Batches = list[list[Pair]]
Side = Callable[[Any, Batches, argparse.Namespace], list[Step]]
"""Maps policy and batches to one step per batch."""


# --- the same pairs and weights for every side -----------------------------------------------------


def sample_pairs(count: int, vocabulary: int, seed: int, responses: int = 1) -> list[Pair]:
    """Sample pairs, `responses` in a row with the same prompt and real response."""
    rng = random.Random(seed)

    def length(median: int, longest: int) -> int:
        return min(longest, max(4, round(rng.lognormvariate(math.log(median), SIGMA))))

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    def group() -> list[Pair]:
        prompt = length(MEDIANS[0], LONGEST_PROMPT)
        medians = [MEDIANS[1], *[MEDIANS[2]] * responses]
        real, *synthetic = ([*tokens(length(median, LONGEST - prompt) - 1), EOS] for median in medians)
        shared = tokens(prompt)
        return [Pair(shared, real, response) for response in synthetic]

    return [pair for _ in range(count // responses) for pair in group()]


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    hidden, heads = options.hidden, options.hidden // 64
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 4 if options.preset == "1b" else hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // (4 if options.preset == "1b" else 2),
        max_position_embeddings=8192,
        tie_word_embeddings=options.preset == "1b",
        pad_token_id=PAD,
        eos_token_id=EOS,
        attn_implementation="sdpa",
    )
    with torch.device(options.device):
        model = LlamaForCausalLM(config).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def autocast(options: argparse.Namespace) -> torch.autocast:
    """Autocast as in training: fp32 weights, matmuls in `dtype`."""
    return torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16")


def frozen_copy(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Return a reference model, which needs no fp32 weights."""
    return copy.deepcopy(model).to(getattr(torch, options.dtype)).eval().requires_grad_(False)


def to_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


# --- the sides ----------------------------------------------------------------------------------


def our_step(
    model: nn.Module, batch: dict[str, Tensor], options: argparse.Namespace, *, own_logits: bool = False
) -> Step:
    opponent: list[Tensor] = []

    def score() -> None:
        with torch.no_grad(), autocast(options):
            opponent[:] = [logps(model.eval(), batch, own_logits=own_logits)]

    def train() -> None:
        with autocast(options):
            policy = logps(model.train(), batch, own_logits=own_logits)
            loss = spin_terms(policy, opponent[0], batch["sides"], Objective(beta=BETA)).loss.mean()
        loss.backward()

    return [(0.5, score), (1.0, train)]


def unpadded_batch(pairs: list[Pair]) -> dict[str, Tensor]:
    """Build one row of all sequences `prompt | response`, without padding and without anything shared."""
    batch = padded_batch(pairs, PAD)
    real_tokens = batch["attention_mask"].bool()
    places = real_tokens.flatten().cumsum(0) - 1  # of the padded batch's tokens in the row
    sequences = sequences_of(groups_of(pairs, grouped=False))
    return batch | {
        "input_ids": batch["input_ids"][real_tokens][None],
        "position_ids": torch.arange(real_tokens.shape[1]).expand_as(real_tokens)[real_tokens][None],
        "keep": places[batch["keep"]],
        "spans": torch.tensor(row_spans([len(part) for part in sequence] for sequence in sequences)),
    }


def own(layout: Callable[[list[Pair]], dict[str, Tensor]], *, shares: bool, own_logits: bool = False) -> Side:
    """Return a side that trains with our code on one layout.

    Args:
        layout: builds the batch.
        shares: whether the layout needs shared-prefix attention.
        own_logits: compute all logits of the padded layout instead of the chunked head.
    """

    def side(model: nn.Module, batches: Batches, options: argparse.Namespace) -> list[Step]:
        install(model)
        if shares:
            enable(model)
        built = (to_device(layout(pairs), options.device) for pairs in batches)
        return [our_step(model, batch, options, own_logits=own_logits) for batch in built]

    return side


def official(model: nn.Module, batches: Batches, options: argparse.Namespace) -> list[Step]:
    reference = frozen_copy(model, options)

    def sequence_logps(side: nn.Module, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        logits = side(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (chosen * mask[:, 1:]).sum(-1).view(2, -1)

    def train(batch: dict[str, Tensor], mask: Tensor) -> None:
        with autocast(options):
            policy = sequence_logps(model, batch, mask)
            with torch.no_grad():
                opponent = sequence_logps(reference, batch, mask)
        real, synthetic = policy - opponent
        (-logsigmoid(BETA * (real - synthetic))).mean().backward()

    def step(pairs: list[Pair]) -> Step:
        batch = to_device(padded_batch(pairs, PAD), options.device)
        mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        mask.view(-1)[batch["keep"] + 1] = True
        return [(1.0, partial(train, batch, mask))]

    return [step(pairs) for pairs in batches]


def word_tokenizer(words: list[str]) -> Any:
    """Build a tokenizer that maps each word to its index, so that texts give the chosen token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def trl(model: nn.Module, batches: Batches, options: argparse.Namespace, *, precompute: bool = False) -> list[Step]:
    """TRL's real trainer, from dataset to training step.

    Args:
        precompute: use TRL's `precompute_ref_log_probs`; the time of that, half a forward, is added as for our sides.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    words = ["<pad>", "</s>", "<unk>", *(f"t{number}" for number in range(3, model.config.vocab_size))]
    texts = [[" ".join(words[token] for token in part) for part in pair[:3]] for pairs in batches for pair in pairs]
    rows = [{"prompt": f"{prompt} ", "chosen": real, "rejected": synthetic} for prompt, real, synthetic in texts]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=options.device == "cpu",
        bf16=options.dtype == "bfloat16",
        precompute_ref_log_probs=precompute,
        report_to=[],
    )
    trainer = DPOTrainer(
        model,
        None if precompute else frozen_copy(model, options),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(words),
    )
    if config.gradient_checkpointing:  # Trainer.train does this before its first step; on by default in trl
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model_wrapped = trainer.accelerator.prepare_model(model)

    def train(batch: dict[str, Any]) -> None:
        trainer.training_step(trainer.model_wrapped, dict(batch))

    def score(inputs: dict[str, Tensor]) -> None:
        with torch.no_grad(), autocast(options):
            model.eval()(**inputs, use_cache=False)

    def step(first: int, pairs: list[Pair]) -> Step:
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(first, first + len(pairs))])
        ours = padded_batch(pairs, PAD)
        assert torch.equal(batch["input_ids"], ours["input_ids"]), "trl uses other tokens"
        inputs = {name: batch[name].to(options.device) for name in ("input_ids", "attention_mask")}
        scoring = [(0.5, partial(score, inputs))] if precompute else []
        return [*scoring, (1.0, partial(train, batch))]

    firsts = accumulate(map(len, batches), initial=0)
    return [step(first, pairs) for first, pairs in zip(firsts, batches, strict=False)]


def attend_within_pairs(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, sizes: list[int], **_: Any
) -> tuple[Tensor, None]:
    """Causal attention within each pair, as in packed training."""
    parts = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def floor(model: nn.Module, batches: Batches, options: argparse.Namespace) -> list[Step]:
    AttentionInterface.register("bench_within_pairs", attend_within_pairs)
    model.set_attn_implementation("bench_within_pairs")

    def train(inputs: dict[str, Any]) -> None:
        with autocast(options):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()

    def step(pairs: list[Pair]) -> Step:
        rows = [[*group.prompt, *group.real, *chain(*group.synthetic)] for group in groups_of(pairs, grouped=True)]
        sizes = [len(row) for row in rows]
        tokens = torch.tensor([[token for row in rows for token in row]], device=options.device)
        positions = torch.cat([torch.arange(size) for size in sizes])[None].to(options.device)
        return [
            (1.0, partial(train, {"input_ids": tokens, "position_ids": positions, "labels": tokens, "sizes": sizes}))
        ]

    return [step(pairs) for pairs in batches]


SIDES: dict[str, Side] = {
    "ours": own(partial(shared_prefix_batch, grouped=True), shares=True),
    "pairs": own(shared_prefix_batch, shares=True),
    "unpadded": own(unpadded_batch, shares=True),
    "padded": own(partial(padded_batch, pad_token_id=PAD), shares=False),
    "logits": own(partial(padded_batch, pad_token_id=PAD), shares=False, own_logits=True),
    "trl": trl,
    "trl_precomputed": partial(trl, precompute=True),
    "official": official,
    "floor": floor,
}
