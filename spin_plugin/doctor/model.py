"""The opponent: its files, its tokenizer, its size, and the memory that training and generation need for it."""

from typing import Any

from rich.filesize import decimal

from spin_plugin.console import SpinError, say, warn
from spin_plugin.doctor.checkup import Skipped
from spin_plugin.doctor.machine import Device, devices
from spin_plugin.doctor.memory import ModelSize, Sharing, generation_bytes, training_bytes
from spin_plugin.doctor.settings import Settings
from spin_plugin.generation.vllm_worker import GPU_SHARE
from spin_plugin.opponent.weights import model_class
from spin_plugin.training.generate import require_intact_opponent
from spin_plugin.training.loading import AxolotlSource
from spin_plugin.training.precision import keeps_masters, offloads, zero_stage

READ_AT_MOST = 8e9  # bytes of weights, a few seconds on a core
NEARLY_FULL = 0.8  # beyond this share little is left for activations
LESS_MEMORY = (
    "use an adapter, `optimizer: adamw_torch_8bit` with `optim_args: {bf16_stochastic_round: true}` or FSDP2 or ZeRO-3 "
    "on more GPUs"
)


def require_reachable(settings: Settings) -> None:
    """Skip a check that needs the base model's configuration, if that is out of reach."""
    if not settings.reachable:
        raise Skipped(f"base_model: {settings.opponent.base_model} is no directory here, and the hub cannot be reached")


def check_opponent(settings: Settings) -> None:
    """Whether a local opponent's weights are complete and, unless reading them takes long, finite."""
    opponent = settings.opponent
    require_reachable(settings)
    places = [place for place in (opponent.directory, opponent.adapter) if place]
    if not places:
        raise Skipped(f"base_model: {opponent.base_model} is on the hub, which verifies downloads")
    size = sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))
    finite = size <= READ_AT_MOST
    require_intact_opponent(opponent, None, finite=finite)
    read = "complete and finite" if finite else "complete; not read for NaN, which takes long: training does it"
    say(f"{' and '.join(map(str, places))}: {decimal(size)}, {read}")


def check_tokenizer(settings: Settings) -> Any:
    """The tokenizer's template and special tokens."""
    require_reachable(settings)
    tokenizer = AxolotlSource(settings.cfg).tokenizer()
    special = {name: getattr(tokenizer, f"{name}_token") for name in ("eos", "pad")}
    for name in [name for name, token in special.items() if token is None]:
        warn(f"tokenizer: no {name} token; set `special_tokens: {{{name}_token: …}}`")
    template = "with a chat template" if tokenizer.chat_template else "without a chat template"
    say(f"{len(tokenizer):,} tokens, eos {special['eos']!r}, pad {special['pad']!r}, {template}")
    return tokenizer


def measure(settings: Settings) -> ModelSize:
    """Count the parameters on the meta device, without loading weights."""
    import torch
    from axolotl.loaders.utils import load_model_config
    from peft import LoraConfig, PeftConfig, get_peft_model

    require_reachable(settings)
    cfg, opponent = settings.cfg, settings.opponent
    config = load_model_config(cfg)
    text = config.get_text_config()
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=opponent.trust_remote_code)
        parameters = sum(one.numel() for one in model.parameters())
        ends = {
            id(end.weight): end.weight.numel()
            for end in (model.get_input_embeddings(), model.get_output_embeddings())
            if end is not None
        }
        adapter = 0
        if settings.training.adapter:
            kind = (
                PeftConfig.from_pretrained(str(opponent.adapter))
                if opponent.adapter
                else LoraConfig(
                    r=cfg.lora_r or 8,
                    target_modules="all-linear" if cfg.lora_target_linear else cfg.lora_target_modules,
                    modules_to_save=cfg.lora_modules_to_save,
                    use_dora=bool(cfg.peft_use_dora),
                    task_type="CAUSAL_LM",
                )
            )
            kind.inference_mode = False
            adapter = sum(one.numel() for one in get_peft_model(model, kind).parameters() if one.requires_grad)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 0)
    head = getattr(text, "head_dim", None) or text.hidden_size // max(1, text.num_attention_heads)
    size = ModelSize(parameters, sum(ends.values()), adapter, 2 * text.num_hidden_layers * heads * head)
    trained = f", adapter {adapter / 1e6:,.2f}M" if adapter else ""
    say(f"{config.model_type}, {parameters / 1e6:,.2f}M parameters{trained}")
    return size


def _itemsize(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def check_training_memory(settings: Settings, size: ModelSize) -> int:
    """Whether weights, gradients and optimizer state fit; returns their bytes on each device."""
    cfg, training = settings.cfg, settings.training
    if (cfg.fsdp_config or {}).get("offload_params") or offloads(training):
        raise Skipped("weights or optimizer state are offloaded to the CPU, whose share is not estimated")
    bits = 4 if cfg.load_in_4bit else 8 if cfg.load_in_8bit else 8 * _itemsize(training.dtype)
    sharing = Sharing(training.world_size, training.fsdp, zero_stage(training), bits)
    needed = training_bytes(size, training, sharing, masters=keeps_masters(training))
    device = min(devices(), key=lambda one: one.memory)
    # without a GPU, all processes share the machine
    total = needed * (1 if device.gpu else training.world_size)
    _require_fit("training", total, device)
    say(
        f"training: {decimal(total)} of {decimal(device.memory)} on {device.name} for weights, gradients and "
        f"{training.optimizer}; activations come on top, not estimated: spin.tokens_per_micro_batch limits them"
    )
    return total


def check_generation_memory(settings: Settings, size: ModelSize) -> None:
    """Whether vLLM's weights and at least one sequence of full length fit."""
    vllm, kwargs = settings.vllm, settings.spin.generation.vllm_kwargs
    if settings.spin.generation.backend == "ray":
        raise Skipped("generation: on a Ray cluster, whose devices are not looked at")
    length = vllm.max_model_len or settings.data.sequence_len
    dtype = settings.training.dtype if vllm.dtype == "auto" else vllm.dtype
    split = vllm.tensor_parallel_size * kwargs.get("pipeline_parallel_size", 1)
    device = min(devices(), key=lambda one: one.memory)
    needs = generation_bytes(size, _itemsize(dtype), split if device.gpu else 1)
    share = vllm.gpu_memory_utilization or (GPU_SHARE if device.gpu else 1.0)
    at_once = needs.sequences(share * device.memory, length)
    used = f"{decimal(round(share * device.memory))} of {device.name} that vLLM may use"
    cache = f"KV cache {decimal(needs.per_token * length)} per {length:,} tokens"
    weights = f"generation: weights {decimal(needs.weights)}, {cache}"
    if at_once < 1:
        raise SpinError(
            f"{weights}; this exceeds the {used}; raise vllm.tensor_parallel_size or lower vllm.max_model_len"
        )
    say(f"{weights}; {at_once:,} such sequences fit into the {used}")


def _require_fit(what: str, needed: int, device: Device) -> None:
    stated = f"{what}: {decimal(needed)} without activations"
    if needed > device.memory:
        raise SpinError(f"{stated}, but {device.name} has {decimal(device.memory)}; {LESS_MEMORY}")
    if needed > NEARLY_FULL * device.memory:
        warn(f"{stated} leave little of the {decimal(device.memory)} of {device.name}; {LESS_MEMORY}")
