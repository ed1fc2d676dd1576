"""Tiny random models of transformers' causal LM families, each compared with one sequence at a time.

`compare_layouts` lets `choose_layout` decide on some pairs. On other pairs it then compares the chosen layout, values
and gradients, with the original model's own logits of one sequence at a time.
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

from spin_plugin.console import SpinError
from spin_plugin.model.forward import install, logps
from spin_plugin.model.layout import Pair, padded_batch, shared_prefix_batch
from spin_plugin.model.logprobs import response_logps
from spin_plugin.model.select import choose_layout

PAD = SMALL["pad_token_id"]

# Tiny sizes under every name that any family uses for them; names that a configuration lacks are skipped.
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

# Overrides that single families need.
OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4},
    "diffllama": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
}
MAX_PARAMETERS = 5_000_000  # a size missing from TINY would allocate gigabytes


def build(family: str, **changes: Any) -> Any:
    """Build a random fp32 model, with a short sliding window if its configuration has one."""
    # Use transformers' own classes: other packages (fla) register theirs under some of the same names.
    config_class: Any = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    model_class: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    default = config_class()
    options = {name: value for name, value in TINY.items() if _accepts(default, name)}
    if hasattr(default, "kv_lora_rank"):  # multi-head latent attention
        options |= {"num_key_value_heads": 2, "head_dim": 16}
    if isinstance(getattr(default, "sliding_window", None), int):
        options["sliding_window"] = 24
    config = config_class(**(options | OVERRIDES.get(family, {}) | changes))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{family}: {size:,} parameters, more than {MAX_PARAMETERS:,}; add its sizes to TINY")
    torch.manual_seed(3)
    model = model_class(config).float().eval()
    with torch.no_grad():  # predictions less uniform than at initialization
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def _accepts(config: Any, name: str) -> bool:
    """Return whether `name` is a settable option, not one that is computed from others."""
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def random_pairs(count: int, *, prompt: int, response: int, seed: int) -> list[Pair]:
    """Return random pairs with up to `prompt` and `response` tokens."""
    rng = random.Random(seed)

    def part(most: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(rng.randint(1, most))]

    return [Pair(part(prompt), part(response), part(response)) for _ in range(count)]


PROBE_ROWS = [random_pairs(3, prompt=60, response=150, seed=0), random_pairs(1, prompt=9, response=9, seed=1)]
TEST_PAIRS = [*random_pairs(2, prompt=40, response=150, seed=2), *random_pairs(2, prompt=9, response=20, seed=3)]


class Verdict(NamedTuple):
    """The layout chosen for a family, and its distance from one sequence at a time."""

    family: str
    chosen: str
    """shared, padded or refused."""
    right: bool
    """The chosen layout agrees or, for a refused model, the padded layout indeed disagrees."""
    reason: str | None
    nats_per_token: float
    """Largest difference of a response's log-probability, in nats per token."""
    gradient: float
    """Relative difference of all gradients."""


def compare_layouts(family: str, **changes: Any) -> Verdict:
    """Let `choose_layout` choose a layout for a model of the family and check whether it was right."""
    model = build(family, **changes)
    original = copy.deepcopy(model)
    install(model)
    reason, chosen, own = None, "refused", True
    try:
        layout = choose_layout(model, PROBE_ROWS, requested=True, pad_token_id=PAD)
        chosen, reason = "shared" if layout.shared_prefix else "padded", layout.padded_reason
        own = layout.own_logits
    except SpinError as error:
        reason = str(error)
    batch = shared_prefix_batch(TEST_PAIRS) if chosen == "shared" else padded_batch(TEST_PAIRS, PAD)
    found, gradients = _step(model, logps(model, batch, own_logits=own))
    values = [_single_logp(original, pair.prompt, pair[side]) for side in (1, 2) for pair in TEST_PAIRS]
    expected, true_gradients = _step(original, torch.stack(values))
    difference = ((found - expected).abs() / batch["lengths"]).max().item()
    names = true_gradients.keys() & gradients.keys()
    squares = sum((gradients[name] - true_gradients[name]).square().sum() for name in names)
    relative = float(squares / sum(true_gradients[name].square().sum() for name in names)) ** 0.5
    agrees = difference < 1e-3 and relative < 1e-2
    return Verdict(family, chosen, agrees if chosen != "refused" else not agrees, reason, difference, relative)


def _single_logp(model: nn.Module, prompt: Any, response: Any) -> Tensor:
    """Compute log p(response | prompt) from the model's own logits of the one sequence."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return response_logps(logits, torch.tensor(response), torch.zeros(len(response), dtype=torch.long), 1)[0]


def _step(model: nn.Module, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the values and the gradients of their weighted sum."""
    model.zero_grad()
    (values * torch.tensor([2.0, -1.0]).repeat_interleave(len(TEST_PAIRS))).sum().backward()
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
