"""Building blocks of first_light.py's checks: settings, cases, results, and a random Llama."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
# spin-plugin need not be installed: the machine may have only torch and transformers.
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]

from sides import BETA, sample_pairs  # noqa: E402

from spin_plugin.model.attention import enable  # noqa: E402
from spin_plugin.model.forward import install, logps  # noqa: E402
from spin_plugin.model.layout import Pair  # noqa: E402
from spin_plugin.objective.losses import Objective, spin_terms  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Setting:
    device: str
    """`cuda` or `cpu`."""
    quick: bool
    """Tiny sizes, only to test that the program runs."""


class Found(NamedTuple):
    """Result of a case."""

    right: bool | None
    """None: left out because this machine cannot decide it."""
    numbers: dict[str, Any]


Case = tuple[str, Callable[[], Found]]
Check = Callable[[Setting], Iterator[Case]]


def llama(setting: Setting, *, hidden: int, layers: int, heads: int, groups: int = 4, vocab: int = 32_000) -> Any:
    """Build a random fp32 Llama for the shared-prefix layout; `groups` query heads share a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // groups),
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    with torch.device(setting.device):
        model = LlamaForCausalLM(config).train()
    install(model)
    enable(model)
    return model


def random_pairs(setting: Setting, count: int, vocab: int, seed: int = 0) -> list[Pair]:
    """Random pairs with UltraChat's lengths."""
    pairs = sample_pairs(count, vocab, seed)
    return [Pair(*(part[: 9 + seed] for part in pair)) for pair in pairs] if setting.quick else pairs


def in_bf16(setting: Setting, enabled: bool = True) -> torch.autocast:
    """Autocast as in a run with `bf16: true`: fp32 weights, bf16 matmuls."""
    return torch.autocast(setting.device, torch.bfloat16, enabled=enabled)


def to_device(batch: dict[str, Tensor], setting: Setting) -> dict[str, Tensor]:
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def first_loss(model: Any, batch: dict[str, Tensor], setting: Setting, *, bf16: bool = True) -> Tensor:
    """The loss before the first step, when the opponent is the policy itself: ln 2, with a gradient."""
    with in_bf16(setting, bf16):
        policy = logps(model, batch)
        return spin_terms(policy, policy, batch["sides"], Objective(beta=BETA)).loss.mean()


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of `expected`."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
