"""Typed views of Axolotl's validated configuration.

Only `training/iteration.py`, `prepare.py` and `loading.py` access the configuration itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_plugin.args import VllmArgs

AXOLOTLS_SAVE_TOTAL_LIMIT = 4


@dataclass(frozen=True)
class OpponentSpec:
    """The model that generates and that training starts from: a base model, with or without an adapter."""

    base_model: str
    """A directory or a repository on the Hub."""
    revision: str | None
    """The commit of a base model on the Hub, once resolved."""
    adapter: Path | None
    dtype: str
    """The dtype in which training loads the model, for example `bfloat16`."""
    trust_remote_code: bool
    quantized: bool
    """Whether training loads the model in 4 or 8 bits; vLLM uses the unquantized model."""
    fp8: bool
    """Whether training computes in fp8."""
    gptq: bool
    overrides: dict[str, Any] | None
    """Overrides of the model's own configuration."""

    @property
    def directory(self) -> Path | None:
        """The base model's directory; None for a model on the Hub."""
        path = Path(self.base_model)
        return path if path.is_dir() else None

    @property
    def hub(self) -> dict[str, Any]:
        """Keyword arguments for loading the base model with transformers."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class DataSpec:
    """Lengths and seeds."""

    sequence_len: int
    seed: int


@dataclass(frozen=True)
class TrainingSpec:
    """One iteration's training run."""

    dtype: str
    """The dtype in which the model is loaded, for example `bfloat16`."""
    fp16_key: str
    """The key that selects float16 (`float16` or `fp16`), for error messages."""
    adapter: bool
    adapter_in_model_dtype: bool
    """Whether the adapter is kept in the model's dtype, not in fp32 (`peft_autocast_adapter_dtype: false`)."""
    optimizer: str
    optim_args: Mapping[str, Any]
    deepspeed: str | Mapping[str, Any] | None
    """DeepSpeed's configuration or the path of its file."""
    fsdp: bool
    empty_on_other_ranks: bool
    """Whether only the first process of each node loads the weights (`cpu_ram_efficient_loading`)."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    num_epochs: float
    max_steps: int | None
    learning_rate: float
    checkpoints: int
    """Maximum number of checkpoints on disk at once."""
    saves_optimizer: bool
    loss_watchdog: bool
    """Whether Axolotl's loss watchdog, and nothing else, can stop training early."""

    @property
    def in_16_bits(self) -> bool:
        """Whether the model is loaded in bfloat16 or float16."""
        return self.dtype in ("bfloat16", "float16")

    @property
    def full_in_16_bits(self) -> bool:
        """Whether all weights of a 16-bit model are trained; the saved model is then rounded to 16 bits again."""
        return self.in_16_bits and not self.adapter


@dataclass(frozen=True)
class LmEvalSpec:
    """What lm-evaluation-harness evaluates every iteration's model on: the options of Axolotl's plugin for it."""

    tasks: tuple[str, ...]
    """Names of tasks, or YAML files that define them; `…:5` with five examples in the prompt."""
    batch_size: int
    chat_template: bool
    """Whether prompts are chat messages (`apply_chat_template`, as in `axolotl lm-eval`)."""
    multiturn: bool
    """Whether the examples in the prompt are turns of a chat (`fewshot_as_multiturn`)."""


def read_opponent(cfg: Any) -> OpponentSpec:
    """Read the opponent of this iteration from Axolotl's validated configuration."""
    return OpponentSpec(
        base_model=str(cfg.base_model),
        revision=cfg.revision_of_model,
        adapter=Path(cfg.lora_model_dir) if cfg.adapter and cfg.lora_model_dir else None,
        dtype=_name(cfg.torch_dtype),
        trust_remote_code=bool(cfg.trust_remote_code),
        quantized=bool(cfg.load_in_4bit or cfg.load_in_8bit),
        fp8=bool(cfg.fp8),
        gptq=bool(cfg.gptq),
        overrides=dict(cfg.overrides_of_model_config) if cfg.overrides_of_model_config else None,
    )


def read_data(cfg: Any) -> DataSpec:
    """Read lengths and seeds from Axolotl's validated configuration."""
    return DataSpec(sequence_len=cfg.sequence_len, seed=int(cfg.seed or 0))


def read_training(cfg: Any) -> TrainingSpec:
    """Read the training options from Axolotl's validated configuration."""
    return TrainingSpec(
        dtype=_name(cfg.torch_dtype),
        fp16_key="float16" if cfg.float16 else "fp16",
        adapter=bool(cfg.adapter),
        adapter_in_model_dtype=cfg.peft_autocast_adapter_dtype is False,
        optimizer=str(getattr(cfg.optimizer, "value", cfg.optimizer)),
        optim_args=_optim_args(cfg.optim_args),
        deepspeed=cfg.deepspeed or None,
        fsdp=bool(cfg.fsdp_config),
        empty_on_other_ranks=bool((cfg.fsdp_config or {}).get("cpu_ram_efficient_loading")),
        micro_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        world_size=cfg.world_size,
        num_epochs=cfg.num_epochs,
        max_steps=cfg.max_steps or None,
        learning_rate=cfg.learning_rate,
        checkpoints=0 if cfg.save_strategy == "no" else 1 + (cfg.save_total_limit or AXOLOTLS_SAVE_TOTAL_LIMIT),
        saves_optimizer=not cfg.save_only_model,
        loss_watchdog=cfg.loss_watchdog_threshold is not None and not cfg.early_stopping_patience,
    )


def read_lm_eval(cfg: Any) -> LmEvalSpec | None:
    """Read the tasks for every iteration's model; None if `plugins:` lacks Axolotl's LMEvalPlugin, or lists no task."""
    if not (cfg.lm_eval_post_train and cfg.lm_eval_tasks):
        return None
    written = cfg.spin_config or {}  # the validated configuration lacks keys that only `axolotl lm-eval` reads
    return LmEvalSpec(
        tasks=tuple(cfg.lm_eval_tasks),
        batch_size=cfg.lm_eval_batch_size,
        chat_template=bool(written.get("apply_chat_template")),
        multiturn=bool(written.get("fewshot_as_multiturn")),
    )


def read_vllm(cfg: Any) -> VllmArgs:
    """Read the user's `vllm:` block. `cfg.vllm` is unsuitable, because Axolotl fills in defaults for its server."""
    return VllmArgs.model_validate(cfg.spin_vllm or {})


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _optim_args(args: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Parse `optim_args`, a mapping or `name=value,…`."""
    if isinstance(args, str):
        return dict(item.partition("=")[::2] for item in args.replace(" ", "").split(","))
    return args or {}
