"""This iteration's synthetic responses: what the opponent is asked, and with which weights it answers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from spin_plugin.args import SpinArgs, VllmArgs
from spin_plugin.config.specs import DataSpec, OpponentSpec, TrainingSpec
from spin_plugin.console import say, warn
from spin_plugin.data.examples import choose_prompts
from spin_plugin.data.real import Real
from spin_plugin.generation.dispatcher import AdapterNotServedError, generate
from spin_plugin.generation.job import Job, Prompts, Request, fingerprint_requests, requests_for
from spin_plugin.generation.python import vllm_python
from spin_plugin.generation.shards import Shards
from spin_plugin.opponent.hub import bytes_of_weights
from spin_plugin.opponent.merge import merge, served_by_vllm
from spin_plugin.opponent.weights import fingerprint, require_complete, require_complete_adapter, require_finite
from spin_plugin.run.atomic import remove_atomically
from spin_plugin.run.checkpoint import check_weights
from spin_plugin.run.directory import RunDir
from spin_plugin.run.disk import Space, require_space

TYPICAL = 0.99  # of the real responses are at most this long
ROOM = 1.5  # times as long may a synthetic one be


@dataclass(frozen=True)
class Generation:
    """One iteration's responses, before any of them is there."""

    run: RunDir
    number: int
    spin: SpinArgs
    """The block as it stands in this iteration."""
    vllm: VllmArgs
    opponent: OpponentSpec
    data: DataSpec
    training: TrainingSpec
    grows: bool
    """Training keeps 32-bit weights of a model that is stored in 16 bits, so a checkpoint is twice as large."""
    real: Real

    @property
    def max_tokens(self) -> int:
        """Longest response, before the prompt's length is known."""
        return self.spin.generation.max_tokens or _longest_response(self.real.train, self.data.sequence_len)

    def prompts(self) -> list[Prompts]:
        """The prompts of each split; held-out prompts are always all used."""
        draw = self.number if self.spin.resample_prompts else 0
        chosen = choose_prompts(len(self.real.train), self.spin.num_prompts, seed=self.data.seed, draw=draw)
        prompts = [Prompts("train", self.real.train, chosen)]
        if self.real.eval is not None:
            chosen = choose_prompts(len(self.real.eval), None, seed=self.data.seed, draw=0)
            prompts.append(Prompts("eval", self.real.eval, chosen))
        return prompts

    def requests(self) -> Callable[[], Iterator[Request]]:
        """Gives every request, as often as it is called."""
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
        """What makes these responses different from others."""
        options, opponent = self.spin.generation, self.opponent
        requests, digest = fingerprint_requests(self.requests()())
        asked = sum(len(prompts.ids) for prompts in self.prompts())
        if left_out := asked - requests // options.num_generations:
            warn(f"{left_out:,} prompts leave no room within vllm.max_model_len and are not used")
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


def generate_responses(generation: Generation) -> Job:
    """Have vLLM generate the responses, with the merged model where it cannot serve the adapter.

    Returns:
        the job that the responses on disk belong to.

    Raises:
        SpinError: vLLM is missing or died, the opponent's weights are damaged, or the disk is too small.
    """
    _warn_off_policy(generation)
    job, adapter = generation.job(), generation.opponent.adapter
    directory = generation.run.iteration(generation.number)
    merged = directory.opponent(job.weights)
    served = adapter is None or (served_by_vllm(adapter) and not merged.exists())
    try:
        _generate(generation, job, None if served else merged)
    except AdapterNotServedError as error:
        say(f"responses are generated with the merged model, because vLLM cannot serve this adapter: {error}")
        _generate(generation, job, merged)
    for merged_opponent in directory.path.glob("opponent*"):
        remove_atomically(merged_opponent)
    return job


def _generate(generation: Generation, job: Job, merged: Path | None) -> None:
    """Generate what is missing, with base model plus adapter, or with the two merged into a directory."""
    options, opponent = generation.spin.generation, generation.opponent
    if merged:
        whole = replace(opponent, base_model=str(merged), revision=None)
        engine = engine_arguments(whole, generation.data, generation.spin, generation.vllm)
        job = replace(job, engine=engine, adapter=None)

    def find_python() -> Path:  # called only when there is something to generate
        if options.max_tokens is None:
            shown = f"{ROOM} times the 99th percentile of the real ones"
            say(f"responses have at most {generation.max_tokens:,} tokens: {shown}")
        python = vllm_python(options.vllm_python)
        _require_sound_opponent(opponent, generation.run.weights)
        require_space(generation.run.root, _bytes_needed(generation, job.requests, merges=merged is not None))
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
    )


def _warn_off_policy(generation: Generation) -> None:
    """Say where responses are not samples of the opponent itself."""
    options = generation.spin.generation
    if options.temperature != 1.0 or options.top_p != 1.0:
        warn(
            f"temperature {options.temperature} and top_p {options.top_p}: SPIN assumes responses sampled from the "
            "opponent itself, which is temperature 1 and top_p 1"
        )
    if generation.opponent.quantised:
        warn("vLLM generates with the unquantised base model plus adapter, training scores with the quantised one")


def _longest_response(examples: Dataset, sequence_len: int) -> int:
    """How many tokens a synthetic response may have by default: 1.5 times the 99th percentile of the real ones.

    At temperature 1 a model now and then does not stop; without a limit a few such responses cost most of the time, and
    training learns nothing more from them.
    """
    import pyarrow.compute as pc

    lengths = pc.list_value_length(examples.data.column("real"))
    typical = pc.quantile(lengths, TYPICAL, interpolation="higher")[0].as_py()
    return min(math.ceil(ROOM * typical), sequence_len)


def engine_arguments(opponent: OpponentSpec, data: DataSpec, spin: SpinArgs, vllm: VllmArgs) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a base model, which an adapter may be added to."""
    arguments = {
        "model": opponent.base_model,
        "revision": opponent.revision,
        "trust_remote_code": opponent.trust_remote_code,
        "skip_tokenizer_init": True,  # prompts and responses are token ids
        "generation_config": "vllm",  # else a model's own file changes the sampling
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


def _require_sound_opponent(opponent: OpponentSpec, memory: Path) -> None:
    """Refuse damaged weights before GPU hours are spent on them. Downloads from the hub were checked on arrival."""
    if base := opponent.directory:
        require_finite(check_weights(base, "model"), memory)
        if "quantization_config" not in (base / "config.json").read_text(encoding="utf-8"):  # other tensors
            require_complete(base, trust_remote_code=opponent.trust_remote_code)
    if opponent.adapter:
        require_finite(check_weights(opponent.adapter, "adapter_model"), memory)
        require_complete_adapter(opponent.adapter, opponent.base_model, **opponent.hub)


def _bytes_needed(generation: Generation, responses: int, *, merges: bool) -> Space:
    """What an iteration writes: surely the model at its end, at most also all these responses and checkpoints.

    Args:
        generation: of the iteration.
        responses: how many are asked for.
        merges: the opponent is written before vLLM generates with it.
    """
    opponent, training, spin = generation.opponent, generation.training, generation.spin
    model = 0
    if merges or not training.adapter or spin.adapter_chain == "merge":
        if base := opponent.directory:
            model = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        else:
            model = bytes_of_weights(opponent.base_model, opponent.revision)
    tokens = responses * min(generation.data.sequence_len, generation.max_tokens)
    pairs = responses * (1 + spin.history_iterations) * 2 * generation.data.sequence_len
    trained = 2 * model if generation.grows else model
    optimizer = 2 * trained if training.saves_optimizer else 0  # Adam's two moments
    # 32-bit weights are saved at the end, too, and then rewritten in 16 bits; DeepSpeed's are not
    sure = trained + model if generation.grows and not training.deepspeed else model
    return Space(sure=sure, likely=sure + 8 * tokens + 4 * pairs + training.checkpoints * (trained + optimizer))
