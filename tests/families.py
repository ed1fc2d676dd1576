"""Causal LM families of transformers, tiny and random, each held to one sequence at a time.

`judge` lets `choose_forms` decide on some pairs, then compares the form it chose with the untouched model's own
logits of each sequence alone, values and gradients, on other pairs.
"""

import copy
import random
from typing import Any, NamedTuple

import torch
import transformers
from tiny import SMALL
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spin_plugin.head import install, logps
from spin_plugin.layout import Pair, flat_batch, padded_batch
from spin_plugin.loss import response_logps
from spin_plugin.messages import SpinError
from spin_plugin.select import choose_forms

PAD = SMALL["pad_token_id"]

# What makes a configuration tiny, by every name that some family has for it; unknown names are left out.
TINY: dict[str, Any] = SMALL | {
    **dict.fromkeys(("d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "hidden_dim"), 64),
    **dict.fromkeys(("ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dim_ff"), 96),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_hidden_groups"), 2),
    **dict.fromkeys(("n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "max_position_embeddings"), 1024),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **{"v_head_dim": 32, "state_size": 8, "ssm_state_size": 8, "zero_expert_num": 2, "is_decoder": True},
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size", "chunk_size", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 32),
    **{
        "index_n_heads": 2,
        "keep_window_size": 16,
        "pad_token_id": PAD,
        "vocab_size_per_layer_input": 320,
        "lru_width": 64,
    },
}

# What a family needs besides.
BESIDES: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4},
    "diffllama": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
}
LARGEST = 5_000_000  # parameters; a name that TINY lacks would make gigabytes


def build(family: str, **changes: Any) -> Any:
    """A random model in fp32; windows that its configuration has are short."""
    # transformers' own classes: packages beside it (fla) register theirs under some of the names
    config_class: Any = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    model_class: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    usual = config_class()
    options = {name: value for name, value in TINY.items() if _has(usual, name)}
    if hasattr(usual, "kv_lora_rank"):  # multi-head latent attention
        options |= {"num_key_value_heads": 2, "head_dim": 16}
    if isinstance(getattr(usual, "sliding_window", None), int):
        options["sliding_window"] = 24
    config = config_class(**(options | BESIDES.get(family, {}) | changes))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(3)
    model = model_class(config).float().eval()
    with torch.no_grad():  # less uniform than a fresh model
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def _has(config: Any, name: str) -> bool:
    """May the name be given? Some are computed from others."""
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def draw_pairs(count: int, *, prompt: int, response: int, seed: int) -> list[Pair]:
    """Pairs whose parts have up to so many tokens."""
    rng = random.Random(seed)

    def part(most: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(rng.randint(1, most))]

    return [Pair(part(prompt), part(response), part(response)) for _ in range(count)]


SHOWN = [draw_pairs(3, prompt=60, response=150, seed=0), draw_pairs(1, prompt=9, response=9, seed=1)]
JUDGED = [*draw_pairs(2, prompt=40, response=150, seed=2), *draw_pairs(2, prompt=9, response=20, seed=3)]


class Verdict(NamedTuple):
    """What was chosen for a family, and how far that is from the truth."""

    family: str
    chosen: str
    """shared, padded or refused."""
    right: bool
    reason: str | None
    nats_a_token: float
    """The largest difference of a response."""
    gradient: float
    """The relative difference of all gradients together."""


def judge(family: str, **changes: Any) -> Verdict:
    model = build(family, **changes)
    untouched = copy.deepcopy(model)
    install(model)
    reason, chosen = None, "refused"
    try:
        forms = choose_forms(model, SHOWN, wanted=True, pad_token_id=PAD)
        chosen, reason = "shared" if forms.shared_prefix else "padded", forms.no_shared_prefix_because
    except SpinError as error:
        reason = str(error)
    batch = flat_batch(JUDGED) if chosen == "shared" else padded_batch(JUDGED, PAD)
    found, gradients = _step(model, logps(model, batch))
    sides = [[_alone(untouched, pair.prompt, response) for pair, response in _with(side)] for side in (1, 2)]
    expected, true_gradients = _step(untouched, torch.stack([torch.stack(side) for side in sides]))
    apart = ((found - expected).abs() / batch["lengths"]).max().item()
    names = true_gradients.keys() & gradients.keys()
    squares = sum((gradients[name] - true_gradients[name]).square().sum() for name in names)
    relative = float(squares / sum(true_gradients[name].square().sum() for name in names)) ** 0.5
    right = apart < 1e-3 and relative < 1e-2
    return Verdict(family, chosen, right if chosen != "refused" else not right, reason, apart, relative)


def _with(side: int) -> list[tuple[Pair, Any]]:
    return [(pair, pair[side]) for pair in JUDGED]


def _alone(model: nn.Module, prompt: Any, response: Any) -> Tensor:
    """Nothing of ours but the sum: the model's logits of one sequence."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return response_logps(logits, torch.tensor(response), torch.zeros(len(response), dtype=torch.long), 1)[0]


def _step(model: nn.Module, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    (values * torch.tensor([[2.0], [-1.0]])).sum().backward()
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
