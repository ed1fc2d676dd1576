"""first_light.py's checks of training: gradient checkpointing, compilations, rounding, and weight updates."""

import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from cases import Case, Found, Setting, first_loss, in_bf16, llama, random_pairs, relative, to_device
from sides import BETA
from torch import Tensor

from spin_plugin.model.forward import logps
from spin_plugin.model.layout import shared_prefix_batch
from spin_plugin.objective.losses import Objective, spin_terms

# Expected compilations at most: one or many blocks, with and without gradients, static then dynamic.
MAX_GRAPHS = 8
LEARNING_RATE, STEPS = 5e-7, 50
NATS = {"bf16": 4.0, "fp32": 0.05}  # per response; an H200 showed up to 1.95 and 0.012


# --- gradient checkpointing ----------------------------------------------------------------------


def gradients(model: Any, batch: dict[str, Tensor], setting: Setting) -> Tensor:
    """Return all gradients, concatenated."""
    model.zero_grad()
    first_loss(model, batch, setting).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def checkpointing_row(reentrant: bool, setting: Setting) -> Found:
    hidden, layers = (64, 2) if setting.quick else (1024, 4)
    model = llama(setting, hidden=hidden, layers=layers, heads=hidden // 32, vocab=500)
    batch = to_device(shared_prefix_batch(random_pairs(setting, 3, 500)), setting)
    expected = gradients(model, batch, setting)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    difference = relative(gradients(model, batch, setting), expected)
    return Found(difference < 1e-3, {"gradients differ by": difference})


def checkpointing(setting: Setting) -> Iterator[Case]:
    """Gradient checkpointing gives the same gradients."""
    yield "reentrant", partial(checkpointing_row, True, setting)
    yield "not reentrant", partial(checkpointing_row, False, setting)


# --- compilations --------------------------------------------------------------------------------


def graphs() -> int:
    """Return the number of graphs that Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def compilations_row(setting: Setting) -> Found:
    """Distinct micro-batches of 1 to 8 pairs, some without gradients, as in training and scoring."""
    batches = 6 if setting.quick else 40
    hidden = 64 if setting.quick else 1024
    model = llama(setting, hidden=hidden, layers=2, heads=hidden // 32, vocab=500)
    seconds, before, compiled = [], graphs(), []
    for number in range(batches):
        batch = to_device(shared_prefix_batch(random_pairs(setting, 1 + number * 5 % 8, 500, number)), setting)
        started = time.perf_counter()
        if number % 4 == 3:
            with torch.no_grad(), in_bf16(setting):
                logps(model, batch).sum().item()
        else:
            gradients(model, batch, setting).sum().item()
        seconds.append(time.perf_counter() - started)
        compiled.append(graphs() - before)
    late = compiled[-1] - compiled[batches // 2]
    usual = statistics.median(seconds)
    numbers = {
        "micro-batches": batches,
        "compilations": compiled[-1],
        "in the second half": late,
        "their seconds": sum(value - usual for value in seconds if value > 3 * usual),
        "usual": usual,
    }
    return Found(compiled[-1] <= MAX_GRAPHS and late == 0, numbers)


def compilations(setting: Setting) -> Iterator[Case]:
    """There are few compilations, none after the first micro-batches."""
    yield "other lengths", partial(compilations_row, setting)


# --- rounding by the shape of the batch ------------------------------------------------------------


@torch.no_grad()
def shapes_row(dtype: str, setting: Setting) -> Found:
    """Compare log-probs of single pairs with those of the same pairs in batches of 8 and 32."""
    hidden, layers, vocab = (64, 2, 500) if setting.quick else (2048, 16, 128_256)
    model = llama(setting, hidden=hidden, layers=layers, heads=hidden // 64, vocab=vocab).eval()
    model.model.norm.weight.mul_(4)  # logits as spread as a trained model's, for realistic rounding errors
    pairs = random_pairs(setting, 32, vocab)

    def values(chosen: list[Any]) -> Tensor:
        with in_bf16(setting, dtype == "bf16"):
            return logps(model, to_device(shared_prefix_batch(chosen), setting)).view(2, -1)  # real, synthetic

    alone = torch.cat([values([pair]) for pair in pairs[:8]], dim=1)
    differences = {size: values(pairs[:size])[:, :8] - alone for size in (8, 32)}
    largest = max(difference.abs().max().item() for difference in differences.values())
    margin = differences[32][0] - differences[32][1]
    numbers: dict[str, Any] = {
        f"nats of {size}": difference.abs().max().item() for size, difference in differences.items()
    }
    for beta in (0.1, 5.0):
        loss = torch.nn.functional.softplus(-beta * margin).mean().item()
        numbers[f"first loss - ln 2 at beta {beta:g}"] = loss - math.log(2)
    return Found(largest <= NATS[dtype], numbers)


def shapes(setting: Setting) -> Iterator[Case]:
    """Effect of the batch shape on log-probs: scoring uses other batch shapes than training."""
    for dtype in NATS:
        yield f"{dtype} alone or in a batch", partial(shapes_row, dtype, setting)


# --- weight updates --------------------------------------------------------------------------------


def changed_share(masters: bool, setting: Setting) -> tuple[float, list[float]]:
    """Return the share of the matrices' elements that 50 AdamW steps change, and the losses."""
    hidden, layers, pairs = (64, 1, 1) if setting.quick else (1024, 4, 4)
    model = llama(setting, hidden=hidden, layers=layers, heads=hidden // 32, vocab=500)
    model = model if masters else model.bfloat16()
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    before = [parameter.detach().clone() for parameter in matrices]
    batch = to_device(shared_prefix_batch(random_pairs(setting, pairs, 500)), setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    opponent, losses = None, []
    for _ in range(STEPS):
        with in_bf16(setting, masters):
            policy = logps(model, batch)
            opponent = policy.detach() if opponent is None else opponent
            loss = spin_terms(policy, opponent, batch["sides"], Objective(beta=BETA)).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = sum(int((now != then).sum()) for now, then in zip(matrices, before, strict=True))
    return changed / sum(parameter.numel() for parameter in matrices), losses


def weights_row(setting: Setting) -> Found:
    share, losses = changed_share(True, setting)
    plain, _ = changed_share(False, setting)
    numbers = {
        "fp32 masters": share,
        "plain bf16": plain,
        "first loss - ln 2": losses[0] - math.log(2),
        "last loss": losses[-1],
    }
    right = share > 0.9 and abs(losses[0] - math.log(2)) < 1e-6 and math.isfinite(losses[-1])
    return Found(right, numbers)


def weights(setting: Setting) -> Iterator[Case]:
    """At a learning rate of 5e-7, steps change fp32 masters but are rounded away in plain bf16."""
    yield f"{STEPS} steps at {LEARNING_RATE:g}", partial(weights_row, setting)
