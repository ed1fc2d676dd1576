"""Measure how much optimizer steps change the weights in each precision scheme, compared with fp32 training.

    python scripts/bench/precision.py [--steps 50] [--json FILE]

A random Llama with weights of standard deviation 0.02 trains on random pairs with SPIN's loss and AdamW, once per
scheme and learning rate, always on the same batches. For the weight matrices, prints the share of changed elements
(`changed`) and the projection of their update on that of the fp32 run: 1 if equal, 0 if nothing changes. `seen` is the
projection of the weights that the forward computes with, `stored` that of the weights that an iteration stores, in bf16
(adapters unchanged). Takes a few minutes on a CPU.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spin_plugin.model.attention import enable
from spin_plugin.model.forward import install, logps
from spin_plugin.model.layout import Pair, shared_prefix_batch
from spin_plugin.objective.losses import Objective, spin_terms
from spin_plugin.training.rounding import dither_masters, dither_residuals, round_masters

RATES = (5e-7, 2e-6, 1e-5)
BETA = 0.1
PAIRS = 4  # per step
LENGTHS = (16, 24, 20)  # tokens of prompt, real response and synthetic response
VOCABULARY = 256
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=2048,
    pad_token_id=0,
    eos_token_id=1,
)
console = Console(soft_wrap=True)

Weights = dict[str, Tensor]
Trainer = Callable[[nn.Module, list[dict[str, Tensor]], float], Weights]
"""Maps model, batches and learning rate to the final matrices, in the precision that training keeps."""


def make_model(dtype: torch.dtype, *, lora: bool = False) -> nn.Module:
    """Build a model with the same bf16-representable random weights, stored in `dtype`."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG).bfloat16().to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at its default of zero, lora_A would have no gradient at first
                nn.init.normal_(parameter, std=0.02)
    install(model)
    enable(model)
    return model


def matrices(model: nn.Module) -> Weights:
    return {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1}


def loss_of(model: nn.Module, batch: dict[str, Tensor], opponent: Tensor) -> Tensor:
    return spin_terms(logps(model, batch), opponent, batch["sides"], Objective(beta=BETA)).loss.mean()


def score(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [logps(model, batch) for batch in batches]


def adamw(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def stochastic(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=0.0, bf16_stochastic_round=True)


def compensated(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from optimi import AdamW

    return AdamW(parameters, lr=rate, weight_decay=0.0, foreach=False)


def rounding_error_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | float:
    """Return the rounding error that compensated summation tracks per weight; 0 for other optimizers."""
    lost = optimizer.state[parameter].get("kahan_comp")
    return 0.0 if lost is None else lost.float()


def trainer(
    optimizer: Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer],
    *,
    autocast: bool,
    dither: bool = False,
) -> Trainer:
    """Plain single-process training with an optimizer, as in Axolotl's trainer."""

    def train(model: nn.Module, batches: list[dict[str, Tensor]], rate: float) -> Weights:
        computing = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        steps = optimizer((p for p in model.parameters() if p.requires_grad), rate)
        if dither:
            dither_masters(model, kept=(), seed=0, everywhere=False)
        with computing:
            opponents = score(model, batches)
        for number, (batch, opponent) in enumerate(zip(batches, opponents, strict=True)):
            with computing:
                loss = loss_of(model, batch, opponent)
            loss.backward()
            steps.step()
            steps.zero_grad()
            if dither and not number:
                dither_residuals(model, steps.state, seed=0)
        named = {name: parameter for name, parameter in model.named_parameters() if name in matrices(model)}
        kept = {name: weight.detach().float() + rounding_error_of(steps, weight) for name, weight in named.items()}
        return kept

    return train


def train_with_zero(model: nn.Module, batches: list[dict[str, Tensor]], rate: float) -> Weights:
    """DeepSpeed ZeRO-2 with `bf16` in one process; returns its fp32 masters."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    config = {
        "train_micro_batch_size_per_gpu": PAIRS,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model.parameters(), rate), config=config)
    dither_masters(engine.module, kept=(), seed=0, everywhere=True)
    opponents = score(engine, batches)
    for batch, opponent in zip(batches, opponents, strict=True):
        engine.backward(loss_of(engine, batch, opponent))
        engine.step()
    named = ((n, p) for n, p in engine.module.named_parameters() if p.dim() > 1)
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named}


# Name, dtype of the weights, and trainer of each scheme.
SCHEMES: dict[str, tuple[torch.dtype, Trainer]] = {
    "fp32 masters": (torch.float32, trainer(adamw, autocast=True, dither=True)),
    "not dithered": (torch.float32, trainer(adamw, autocast=True)),
    "ZeRO": (torch.bfloat16, train_with_zero),
    "stochastic rounding": (torch.bfloat16, trainer(stochastic, autocast=True)),
    "compensated": (torch.bfloat16, trainer(compensated, autocast=True, dither=True)),
    "plain bf16": (torch.bfloat16, trainer(adamw, autocast=True)),
    "LoRA": (torch.bfloat16, trainer(adamw, autocast=True, dither=True)),
}


def update(before: Weights, after: Weights) -> Tensor:
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)]).double()


def projection(update: Tensor, reference: Tensor) -> float:
    return float(update @ reference / (reference @ reference))


@cache
def reference_update(rate: float, steps: int, *, lora: bool) -> Tensor:
    """Return the update of the fp32 run."""
    exact = make_model(torch.float32, lora=lora)
    return update(matrices(exact), trainer(adamw, autocast=False)(exact, sample_batches(steps), rate))


def sample_batches(steps: int) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)

    def pair() -> Pair:
        return Pair(*(torch.randint(2, VOCABULARY, (length,), generator=random).tolist() for length in LENGTHS))

    return [shared_prefix_batch([pair() for _ in range(PAIRS)]) for _ in range(steps)]


def compare(scheme: str, rate: float, steps: int) -> dict[str, Any]:
    """Measure one scheme at one learning rate."""
    (dtype, train), lora = SCHEMES[scheme], scheme == "LoRA"
    reference = reference_update(rate, steps, lora=lora)
    model = make_model(dtype, lora=lora)
    start = matrices(model)
    after = train(model, sample_batches(steps), rate)
    trained = update(start, after)
    # autocast does not round an fp32 embedding table
    seen = update(
        start, {n: w if "embed" in n and dtype == torch.float32 else w.bfloat16().float() for n, w in after.items()}
    )
    if not lora:  # adapters are stored unchanged
        round_masters(model, kept=(), seed=0, everywhere=scheme == "ZeRO")
    return {
        "way": scheme,
        "learning_rate": rate,
        "changed": float((trained != 0).double().mean()),
        "projection": projection(trained, reference),
        "seen": projection(seen, reference),
        "stored": projection(update(start, matrices(model)), reference),
    }


@contextmanager
def one_process() -> Iterator[None]:
    """Initialize torch.distributed with one process, for DeepSpeed."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with one_process():
        rows = [
            compare(scheme, rate, options.steps)
            for scheme in track(SCHEMES, "training", console=console)
            for rate in RATES
        ]
    columns = ("changed", "projection", "seen", "stored")
    table = Table("way", "learning rate", *columns)
    for row in rows:
        table.add_row(row["way"], f"{row['learning_rate']:g}", *(f"{row[column]:.3f}" for column in columns))
    console.print(table)
    if options.json:
        content = {"steps": options.steps, "torch": torch.__version__, "ways": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
