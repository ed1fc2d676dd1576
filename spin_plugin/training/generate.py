"""Generate an iteration's synthetic responses: build the job, check the opponent, run vLLM."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from spin_plugin.args import SpinArgs, VllmArgs
from spin_plugin.config.specs import DataSpec, OpponentSpec, TrainingSpec
from spin_plugin.console import note, say, warn
from spin_plugin.data.examples import choose_prompts
from spin_plugin.data.real import Real
from spin_plugin.generation.dispatcher import AdapterNotServedError, generate
from spin_plugin.generation.job import Job, Prompts, Request, fingerprint_requests, requests_for
from spin_plugin.generation.python import vllm_python
from spin_plugin.generation.shards import Shards
from spin_plugin.objective.losses import LOSSES
from spin_plugin.opponent.hub import bytes_of_weights
from spin_plugin.opponent.merge import merge, vllm_can_serve
from spin_plugin.opponent.weights import fingerprint, require_complete, require_complete_adapter, require_finite
from spin_plugin.run.atomic import remove_atomically
from spin_plugin.run.checkpoint import check_weights
from spin_plugin.run.directory import RunDir
from spin_plugin.run.disk import Space, require_space

QUANTILE = 0.99  # of the real responses' lengths
LENGTH_FACTOR = 1.5  # longest synthetic response relative to that quantile


@dataclass(frozen=True)
class Generation:
    """Everything that determines the responses of one iteration."""

    run: RunDir
    number: int
    spin: SpinArgs
    """The `spin:` block resolved for this iteration."""
    vllm: VllmArgs
    opponent: OpponentSpec
    data: DataSpec
    training: TrainingSpec
    has_masters: bool
    """Training keeps 32-bit masters of a 16-bit model, which doubles the size of a checkpoint."""
    real: Real

    @property
    def max_tokens(self) -> int:
        """Longest response, whatever its prompt's length."""
        return self.spin.generation.max_tokens or longest_response(self.real.train, self.data.sequence_len)

    def prompts(self) -> list[Prompts]:
        """Return the prompts of each split; the eval split is always used entirely."""
        sample = self.number if self.spin.resample_prompts else 0
        chosen = choose_prompts(len(self.real.train), self.spin.num_prompts, seed=self.data.seed, sample=sample)
        prompts = [Prompts("train", self.real.train, chosen)]
        if self.real.eval is not None:
            chosen = choose_prompts(len(self.real.eval), None, seed=self.data.seed, sample=0)
            prompts.append(Prompts("eval", self.real.eval, chosen))
        return prompts

    def requests(self) -> Callable[[], Iterator[Request]]:
        """Return a function that yields every request; it can be called repeatedly."""
        options = self.spin.generation
        return partial(
            requests_for,
            self.prompts(),
            iteration=self.number,
            seed=self.data.seed if options.seed is None else options.seed,
            samples=options.num_generations,
            sequence_len=min(self.data.sequence_len, self.vllm.max_model_len or self.data.sequence_len),
            max_tokens=self.max_tokens,
        )

    def job(self) -> Job:
        """Return the generation job of this iteration."""
        options, opponent = self.spin.generation, self.opponent
        requests, digest = fingerprint_requests(self.requests()())
        chosen = sum(len(prompts.ids) for prompts in self.prompts())
        if left_out := chosen - requests // options.num_generations:
            warn(f"vllm.max_model_len: leaving out {left_out:,} prompts that leave no space for a response")
        adapter = str(opponent.adapter) if opponent.adapter else None
        return Job(
            iteration=self.number,
            engine=engine_arguments(opponent, self.data, self.spin, self.vllm),
            adapter=adapter,
            weights=fingerprint(filter(None, (opponent.base_model, adapter)), opponent.revision, self.run.weights),
            sampling={
                "temperature": options.temperature,
                "top_p": options.top_p,
                "stop_token_ids": self.real.stop_tokens,
            },
            requests=requests,
            requests_sha256=digest,
            revision=opponent.revision,
        )


def generate_responses(generation: Generation, on_shard: Callable[[int], None] | None = None) -> Job:
    """Generate the responses with vLLM, from the merged model if vLLM cannot serve the adapter.

    Args:
        generation: the iteration's generation.
        on_shard: called with the number of each new shard of responses once it is written.

    Returns:
        the job of the responses on disk.

    Raises:
        SpinError: vLLM is missing or exited, the opponent's weights are damaged, or the disk is too full.
    """
    _warn_off_policy(generation)
    job, adapter = generation.job(), generation.opponent.adapter
    directory = generation.run.iteration(generation.number)
    merged = directory.opponent(job.weights)
    served = adapter is None or (vllm_can_serve(adapter) and not merged.exists())
    try:
        _generate(generation, job, None if served else merged, on_shard)
    except AdapterNotServedError as error:
        say(f"generating with the merged model because vLLM cannot serve this adapter: {error}")
        _generate(generation, job, merged, on_shard)
    for merged_opponent in directory.path.glob("opponent*"):
        remove_atomically(merged_opponent)
    return job


def _generate(generation: Generation, job: Job, merged: Path | None, on_shard: Callable[[int], None] | None) -> None:
    """Generate the missing responses, from the model in `merged` (written if missing) instead of the adapter if set."""
    options, opponent = generation.spin.generation, generation.opponent
    if merged:
        merged_opponent = replace(opponent, base_model=str(merged), revision=None)
        engine = engine_arguments(merged_opponent, generation.data, generation.spin, generation.vllm)
        job = replace(job, engine=engine, adapter=None)

    def find_python() -> Path:  # called only if responses are missing
        if options.max_tokens is None:
            source = f"{LENGTH_FACTOR} times the 99th percentile of the real ones"
            note(f"responses are limited to {generation.max_tokens:,} tokens ({source})")
        python = vllm_python(options.vllm_python)
        require_intact_opponent(opponent, generation.run.weights)
        model = model_bytes(generation, merges=merged is not None)
        require_space(generation.run.root, bytes_needed(generation, job.requests, model))
        if merged and opponent.adapter and not merged.exists():
            merge(opponent, opponent.adapter, merged)
        return python

    generate(
        job,
        Shards(generation.run.iteration(generation.number).synthetic),
        generation.requests(),
        find_python,
        engines=generation.vllm.data_parallel_size,
        ray=options.backend == "ray",
        ray_address=options.ray_address,
        on_shard=on_shard,
    )


def _warn_off_policy(generation: Generation) -> None:
    """Warn if responses are not samples of the opponent's own distribution."""
    options = generation.spin.generation
    if options.temperature != 1.0 or options.top_p != 1.0:
        warn(
            f"spin.generation: temperature {options.temperature} and top_p {options.top_p} change the opponent's "
            "distribution; SPIN assumes temperature 1 and top_p 1"
        )
    if generation.opponent.quantized:
        warn("vLLM generates with the unquantized base model plus adapter, but training scores with the quantized one")


def longest_response(examples: Dataset, sequence_len: int) -> int:
    """Return the default limit of a response in tokens: 1.5 times the 99th percentile of the real ones.

    At temperature 1 a model occasionally does not stop. Without a limit a few such responses take most of the time and
    teach the model nothing.
    """
    import pyarrow.compute as pc

    lengths = pc.list_value_length(examples.data.column("real"))
    quantile = pc.quantile(lengths, QUANTILE, interpolation="higher")[0].as_py()
    return min(math.ceil(LENGTH_FACTOR * quantile), sequence_len)


def engine_arguments(opponent: OpponentSpec, data: DataSpec, spin: SpinArgs, vllm: VllmArgs) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for the opponent's base model."""
    arguments = {
        "model": opponent.base_model,
        "revision": opponent.revision,
        "trust_remote_code": opponent.trust_remote_code,
        "skip_tokenizer_init": True,  # prompts and responses are token ids
        "generation_config": "vllm",  # ignore the model's generation_config.json, which changes the sampling
        "dtype": opponent.dtype if vllm.dtype == "auto" else vllm.dtype,
        "hf_overrides": opponent.overrides,
        "seed": data.seed,
        "max_model_len": vllm.max_model_len or data.sequence_len,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "enable_prefix_caching": vllm.enable_prefix_caching,
        "enforce_eager": vllm.enforce_eager,
        **spin.generation.vllm_kwargs,
    }
    return {key: value for key, value in arguments.items() if value is not None}


def require_intact_opponent(opponent: OpponentSpec, facts: Path | None, *, finite: bool = True) -> None:
    """Refuse damaged weights before spending GPU hours on them. Downloads from the hub are already verified.

    Args:
        opponent: the opponent.
        facts: see `weights.facts_of`.
        finite: also read every number, to find NaN and infinity.

    Raises:
        SpinError: names the damaged file or the missing tensor.
    """
    if base := opponent.directory:
        files = check_weights(base, "model")
        require_finite(files if finite else [], facts)
        if "quantization_config" not in (base / "config.json").read_text(encoding="utf-8"):  # its tensor names differ
            require_complete(base, trust_remote_code=opponent.trust_remote_code)
    if opponent.adapter:
        files = check_weights(opponent.adapter, "adapter_model")
        require_finite(files if finite else [], facts)
        require_complete_adapter(opponent.adapter, opponent.base_model, **opponent.hub)


def model_bytes(generation: Generation, *, merges: bool) -> int:
    """Return the size of the whole model that an iteration writes; 0 if it writes only an adapter.

    Args:
        generation: the iteration's generation.
        merges: the merged opponent is written first.
    """
    if not (merges or writes_model(generation.training, generation.spin)):
        return 0
    if base := generation.opponent.directory:
        return sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return bytes_of_weights(generation.opponent.base_model, generation.opponent.revision)


def writes_model(training: TrainingSpec, spin: SpinArgs) -> bool:
    """Whether an iteration ends with a whole model on disk, not only with an adapter."""
    return not training.adapter or spin.adapter_chain == "merge"


def bytes_needed(generation: Generation, responses: int, model: int) -> Space:
    """Return the disk space of an iteration: at least its final model, at most also all responses and checkpoints.

    Args:
        generation: the iteration's generation.
        responses: number of requests.
        model: see `model_bytes`.
    """
    training, spin = generation.training, generation.spin
    tokens = responses * min(generation.data.sequence_len, generation.max_tokens) if responses else 0
    sequences = 3 if LOSSES[spin.loss_type].uses_initial else 2
    pairs = responses * (1 + spin.history_iterations) * sequences * generation.data.sequence_len
    trained = 2 * model if generation.has_masters else model
    optimizer = 2 * trained if training.saves_optimizer else 0  # Adam's two moments
    data, checkpoint = 8 * tokens + 4 * pairs, trained + optimizer
    # 32-bit weights are saved first and then rewritten in 16 bits, except with DeepSpeed
    minimum = trained + model if generation.has_masters and not training.deepspeed else model
    return Space(
        minimum=minimum,
        expected=minimum + data + training.checkpoints * checkpoint,
        finished=model + data + max(0, training.checkpoints - 1) * checkpoint,  # the oldest one is removed
        data=data,
    )
