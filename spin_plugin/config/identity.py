"""Which configuration keys are fixed within a run, and which may change when it resumes."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from spin_plugin.args import GenerationArgs, JudgeArgs, Mark, SpinArgs

# Keys that do not affect the result, so that they may change when a run resumes.
FREE_KEYS = frozenset(
    {
        "logging_steps", "save_steps", "saves_per_epoch", "save_strategy", "save_total_limit", "save_only_model",
        "debug_text_only", "debug_num_examples", "prompter", "shard", "download", "iterable", "num_processes",
        "main_process_port", "cloud", "sweep",
        "save_first_step", "eval_steps", "evals_per_epoch", "eval_strategy", "debug", "strict", "output_dir",
        "dataset_prepared_path", "dataset_num_proc", "dataset_processes", "dataset_keep_in_memory",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "hf_use_auth_token",
        "auto_resume_from_checkpoints", "resume_from_checkpoint", "axolotl_config_path", "is_preprocess",
        "export", "sync_profiler_steps", "sync_profiler_start_step",
        "device", "device_map", "ddp_timeout", "profiler_steps", "gc_steps", "include_tkps", "hub_strategy",
        "use_ray", "ray_num_workers", "ray_run_name", "inference", "merge_lora",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading", "deepspeed",
        "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel",
    }
)  # fmt: skip
FREE_PREFIXES = ("wandb_", "use_wandb", "mlflow_", "use_mlflow", "comet_", "use_comet", "trackio_", "use_trackio",
                 "use_tensorboard", "use_otel", "otel_", "hub_", "lm_eval_", "eval_", "fsdp", "ddp_")  # fmt: skip
# Since Axolotl 0.21 listing this one is optional; the other evaluates finished models.
FREE_PLUGINS = ("spin_plugin", "axolotl.integrations.lm_eval")
# The only keys of Axolotl's `vllm:` block that affect what vLLM computes.
FIXED_VLLM_KEYS = frozenset({"dtype", "max_model_len"})
# Keys of `vllm_kwargs` that affect how vLLM uses memory and devices, not what it computes.
FREE_VLLM_KWARGS = frozenset(
    {
        "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill",
        "cpu_offload_gb", "disable_log_stats", "disable_custom_all_reduce", "block_size",
        "distributed_executor_backend", "pipeline_parallel_size", "download_dir", "load_format",
    }
)  # fmt: skip


def _fixed_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that must not change within a run, nested keys joined by dots."""
    spin = config.get("spin") or {}
    free, free_generation = SpinArgs.marked(Mark.FREE), GenerationArgs.marked(Mark.FREE)
    fixed = {
        key: value
        for key, value in config.items()
        if key not in ("spin", "vllm")
        and key not in FREE_KEYS
        and not key.startswith(FREE_PREFIXES)
        and value is not None
    }
    fixed["plugins"] = [name for name in fixed.get("plugins") or [] if not str(name).startswith(FREE_PLUGINS)]
    # A step may be split into more, smaller micro-batches to fit into memory; its pairs stay the same.
    factors = [fixed.pop(key, None) for key in ("micro_batch_size", "gradient_accumulation_steps")]
    fixed["micro_batch_size × gradient_accumulation_steps"] = _product(factors)
    fixed |= {f"spin.{k}": v for k, v in spin.items() if k not in free and k not in ("generation", "judge")}
    judge, free_judge = spin.get("judge") or {}, JudgeArgs.marked(Mark.FREE)
    fixed |= {f"spin.judge.{k}": v for k, v in judge.items() if k not in free_judge}
    generation = dict(spin.get("generation") or {})
    kwargs = generation.pop("vllm_kwargs", None) or {}
    vllm = {k: v for k, v in (config.get("vllm") or {}).items() if k in FIXED_VLLM_KEYS and v not in (None, "auto")}
    fixed |= {f"vllm.{k}": v for k, v in vllm.items()}
    fixed |= {f"spin.generation.{k}": v for k, v in generation.items() if k not in free_generation}
    return fixed | {f"spin.generation.vllm_kwargs.{k}": v for k, v in kwargs.items() if k not in FREE_VLLM_KWARGS}


def _product(factors: list[Any]) -> Any:
    """Return the product of the numbers that are set; values that are not numbers unchanged, for Axolotl to reject."""
    try:
        return math.prod(int(factor) for factor in factors if factor is not None)
    except (TypeError, ValueError):
        return factors


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any], begun: int) -> list[str]:
    """Return the fixed keys that differ between two configurations of one run directory.

    Iterations may be added, but the schedule of the first `begun` iterations is fixed.
    """
    old, new = (_as_json(_fixed_keys(config)) for config in (before, now))
    keys = [key for key in sorted(old.keys() | new.keys()) if not same_value(old.get(key), new.get(key))]
    differs = not all(same_value(_scheduled(before, number), _scheduled(now, number)) for number in range(begun))
    return keys + (["spin.schedule"] if differs else [])


def same_value(old: Any, new: Any) -> bool:
    """Whether two configuration values are equivalent. YAML parses `5e-5` as a string, but 0.00005 as a number."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(same_value(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(same_value, old, new))
    if isinstance(old, str) != isinstance(new, str):
        with suppress(ValueError, TypeError):
            return float(old) == float(new)
    return old == new


def _scheduled(config: Mapping[str, Any], iteration: int) -> Any:
    """Return the schedule's entry for one iteration."""
    schedule = (config.get("spin") or {}).get("schedule") or []
    return _as_json(schedule[iteration]) if iteration < len(schedule) else {}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
