"""This iteration's synthetic responses: what is asked of the opponent, and from which weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from spin_plugin.args import SpinArgs, VllmArgs
from spin_plugin.console import say, warn
from spin_plugin.data.examples import choose_prompts
from spin_plugin.data.real import Real
from spin_plugin.generation.dispatcher import AdapterNotServedError, generate
from spin_plugin.generation.job import Job, Prompts, Request, fingerprint_requests, requests_for
from spin_plugin.generation.python import vllm_python
from spin_plugin.generation.shards import Shards
from spin_plugin.opponent.hub import bytes_of_weights, commit_of
from spin_plugin.opponent.merge import merge, served_by_vllm
from spin_plugin.opponent.weights import fingerprint, require_complete, require_complete_adapter, require_finite
from spin_plugin.run.atomic import remove_atomically
from spin_plugin.run.checkpoint import check_weights
from spin_plugin.run.directory import RunDir
from spin_plugin.run.disk import Space, require_space
from spin_plugin.training.precision import HALF, is_lean

# --- responses ---------------------------------------------------------------------------------


def base_revision(cfg: Any, run: RunDir, number: int) -> str | None:
    """The commit of a base model on the hub; None of a local one. An adapter stays on the one it was trained on."""
    if Path(str(cfg.base_model)).is_dir():
        return None
    before = (Shards(run.iteration(number - 1).synthetic).manifest() or {}) if number else {}
    return before.get("revision") or commit_of(str(cfg.base_model), cfg.revision_of_model)


def _draw(cfg: Any, run: RunDir, spin: SpinArgs, number: int, real: Real, revision: str | None) -> Job:
    """Have vLLM draw this iteration's responses, from the merged model where it cannot serve the adapter."""
    options, vllm = spin.generation, vllm_args(cfg)
    _warn_off_policy(cfg, spin)
    prompts = _prompts(cfg, spin, number, real)
    max_tokens = options.max_tokens or _longest_response(real.train, cfg.sequence_len)
    requests = _requests(cfg, spin, number, prompts, max_tokens)
    count, digest = fingerprint_requests(requests())
    if left_out := sum(len(ids) for _, _, ids in prompts) - count // options.num_generations:
        warn(f"{left_out:,} prompts leave no room within vllm.max_model_len and are not played")
    sampling = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stop_token_ids": real.stop_tokens,
    }
    adapter = str(cfg.lora_model_dir) if cfg.adapter and cfg.lora_model_dir else None
    weights = fingerprint(filter(None, (str(cfg.base_model), adapter)), revision, run.weights)
    job = Job(number, engine_arguments(cfg, spin, revision), adapter, weights, sampling, count, digest, revision)
    whole = run.iteration(number).opponent(weights)

    def draw(job: Job) -> None:
        def find_python() -> Path:  # asked only when there is something to draw
            if options.max_tokens is None:
                say(f"responses have at most {max_tokens:,} tokens: 1.5 times the 99th percentile of the real ones")
            python = vllm_python(options.vllm_python)
            _require_sound_opponent(cfg, adapter, run.weights)
            require_space(
                run.root, _bytes_needed(cfg, spin, count, max_tokens, merges=adapter is not None and not job.adapter)
            )
            if adapter and not job.adapter and not whole.exists():
                merge(cfg, Path(adapter), whole)
            return python

        generate(
            job,
            Shards(run.iteration(number).synthetic),
            requests,
            find_python,
            engines=vllm.data_parallel_size,
            ray=options.backend == "ray",
            ray_address=options.ray_address,
        )

    merged = replace(job, engine=engine_arguments(cfg, spin, None, merged=whole), adapter=None)
    served = adapter is None or (served_by_vllm(Path(adapter)) and not whole.exists())
    try:
        draw(job if served else merged)
    except AdapterNotServedError as error:
        say(f"responses are drawn from the merged model, as vLLM cannot serve this adapter: {error}")
        draw(merged)
    for merged_opponent in run.iteration(number).path.glob("opponent*"):
        remove_atomically(merged_opponent)
    return job


def _warn_off_policy(cfg: Any, spin: SpinArgs) -> None:
    """Say where y' is not drawn from the opponent itself."""
    options = spin.generation
    if options.temperature != 1.0 or options.top_p != 1.0:
        warn(
            f"temperature {options.temperature} and top_p {options.top_p}: SPIN assumes responses drawn from the "
            "opponent itself, which is temperature 1 and top_p 1"
        )
    if cfg.load_in_4bit or cfg.load_in_8bit:
        warn("vLLM draws from the unquantised base model plus adapter, training scores with the quantised one")


def _prompts(cfg: Any, spin: SpinArgs, number: int, real: Real) -> list[Prompts]:
    """What an iteration plays of each split; held-out prompts are always all played."""
    seed = int(cfg.seed or 0)
    draw = number if spin.resample_prompts else 0
    train = choose_prompts(len(real.train), spin.num_prompts, seed=seed, draw=draw)
    prompts = [Prompts("train", real.train, train)]
    if real.eval is not None:
        prompts.append(Prompts("eval", real.eval, choose_prompts(len(real.eval), None, seed=seed, draw=0)))
    return prompts


def _longest_response(examples: Dataset, sequence_len: int) -> int:
    """How many tokens a synthetic response may have where nobody says: 1.5 times the 99th percentile of the real ones.

    At temperature 1 a model now and then does not find its end; without a limit a few such responses cost most of the
    time, and teach nothing that the limit does not.
    """
    import pyarrow.compute as pc

    lengths = pc.list_value_length(examples.data.column("real"))
    typical = pc.quantile(lengths, 0.99, interpolation="higher")[0].as_py()
    return min(math.ceil(1.5 * typical), sequence_len)


def _requests(
    cfg: Any, spin: SpinArgs, number: int, prompts: list[Prompts], max_tokens: int
) -> Callable[[], Iterator[Request]]:
    """Gives every request of an iteration, as often as it is called."""
    options, vllm = spin.generation, vllm_args(cfg)
    return partial(
        requests_for,
        prompts,
        iteration=number,
        seed=int(cfg.seed or 0) if options.seed is None else options.seed,
        samples=options.num_generations,
        sequence_len=min(cfg.sequence_len, vllm.max_model_len or cfg.sequence_len),
        max_tokens=max_tokens,
    )


def vllm_args(cfg: Any) -> VllmArgs:
    """What the user's `vllm:` block says; Axolotl fills in defaults for its server, so not what it holds now."""
    return VllmArgs.model_validate(cfg.spin_vllm or {})


def engine_arguments(cfg: Any, spin: SpinArgs, revision: str | None, *, merged: Path | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the opponent, which may be a model with its adapter merged into it."""
    vllm = vllm_args(cfg)
    arguments = {
        "model": str(merged or cfg.base_model),
        "revision": revision,
        "trust_remote_code": bool(cfg.trust_remote_code),
        "skip_tokenizer_init": True,  # prompts and responses are token ids
        "generation_config": "vllm",  # else a model's own file changes the sampling
        "dtype": str(cfg.torch_dtype).removeprefix("torch.") if vllm.dtype == "auto" else vllm.dtype,
        "hf_overrides": dict(cfg.overrides_of_model_config) if cfg.overrides_of_model_config else None,
        "seed": int(cfg.seed or 0),
        "max_model_len": vllm.max_model_len or cfg.sequence_len,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "enable_prefix_caching": vllm.enable_prefix_caching,
        "enforce_eager": vllm.enforce_eager,
        **spin.generation.vllm_kwargs,
    }
    return {key: value for key, value in arguments.items() if value is not None}


def _require_sound_opponent(cfg: Any, adapter: str | None, memory: Path) -> None:
    """Refuse damaged weights before a GPU hour is spent on them. What comes from the hub was checked on its way."""
    base, code = Path(str(cfg.base_model)), bool(cfg.trust_remote_code)
    if base.is_dir():
        require_finite(check_weights(base, "model"), memory)
        if "quantization_config" not in (base / "config.json").read_text(encoding="utf-8"):  # other tensors
            require_complete(base, trust_remote_code=code)
    if adapter:
        require_finite(check_weights(Path(adapter), "adapter_model"), memory)
        require_complete_adapter(Path(adapter), str(base), revision=cfg.revision_of_model, trust_remote_code=code)


def _bytes_needed(cfg: Any, spin: SpinArgs, responses: int, max_tokens: int, *, merges: bool) -> Space:
    """What an iteration writes: surely the model at its end, at most also all these responses and checkpoints.

    Args:
        merges: the opponent is written before vLLM draws from it.
    """
    from axolotl.loaders.utils import load_model_config

    base = Path(str(cfg.base_model))
    writes_model = merges or not cfg.adapter or spin.adapter_chain == "merge"
    model = 0
    if writes_model and base.is_dir():
        model = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    elif writes_model:
        model = bytes_of_weights(str(cfg.base_model), cfg.revision_of_model)
    tokens = responses * min(cfg.sequence_len, max_tokens)
    pairs = responses * (1 + spin.history_iterations) * 2 * cfg.sequence_len
    masters = cfg.torch_dtype in HALF and not (cfg.adapter or is_lean(cfg))
    grows = masters and str(load_model_config(cfg).dtype).removeprefix("torch.") in ("bfloat16", "float16")
    trained = 2 * model if grows else model
    optimizer = 0 if cfg.save_only_model else 2 * trained  # Adam's two moments
    checkpoints = 0 if cfg.save_strategy == "no" else 1 + (cfg.save_total_limit or 4)  # 4 is Axolotl's own
    # masters are saved at the end, too, and then rewritten in 16 bits; DeepSpeed's are not
    sure = trained + model if grows and not cfg.deepspeed else model
    return Space(sure=sure, likely=sure + 8 * tokens + 4 * pairs + checkpoints * (trained + optimizer))
