"""One iteration up to training: tokenised data, the opponent's responses, pairs, all on disk."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from spin_plugin.args import SpinArgs
from spin_plugin.checkpoint import check_weights
from spin_plugin.generation.interpreter import vllm_python
from spin_plugin.generation.job import Job, Prompts, Request, fingerprint_requests, requests_for
from spin_plugin.generation.launcher import AdapterNotServedError, generate
from spin_plugin.generation.shards import Shards
from spin_plugin.merge import merge, served_by_vllm
from spin_plugin.messages import SpinError, say, warn
from spin_plugin.pairs import (
    PairStats,
    Synthetic,
    build_pairs,
    choose_prompts,
    open_table,
    read_stats,
    write_stats,
)
from spin_plugin.real import Real, prepare_real
from spin_plugin.run import IterationDir, RunDir, make_folder_whole, remove_whole, without_secrets, write_whole
from spin_plugin.space import Space, require_space
from spin_plugin.weights import fingerprint, require_complete, require_complete_adapter, require_finite

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class PairsOnDisk:
    """The pairs of an iteration, memory-mapped."""

    train: Dataset
    eval: Dataset | None
    stats: dict[str, PairStats]
    opponent_files: dict[str, Path]
    weights: str
    """Fingerprint of the opponent's weights."""

    def opponent_key(self, split: str) -> str:
        """What the opponent's log-probabilities of a split depend on: its weights, and every token of the pairs."""
        pairs = self.opponent_files[split].with_name(f"{split}.arrow")
        with open(pairs, "rb") as content:
            return f"{self.weights}/{hashlib.file_digest(content, 'sha256').hexdigest()}"


def prepare_iteration(cfg: Any, run: RunDir, spin: SpinArgs, number: int) -> PairsOnDisk:
    """Everything before training; what is on disk already is kept.

    Args:
        cfg: Axolotl's validated configuration.
        run: the run directory.
        spin: the block as it stands in this iteration.
        number: the iteration.

    Raises:
        SpinError: the data cannot be used, or vLLM is missing or died.
    """
    folder = run.iteration(number)
    folder.path.mkdir(parents=True, exist_ok=True)
    resolved = {key: value for key, value in without_secrets(cfg).items() if key != "spin_config"}
    write_whole(folder.config, yaml.safe_dump(json.loads(json.dumps(resolved, default=str))))
    real = prepare_real(cfg, run, spin)
    job = _draw(cfg, run, spin, number, real)
    sources = range(max(0, number - spin.history), number + 1)
    key = _pairs_key(run, sources, job, spin, cfg)
    if not _has_pairs(folder, key):
        for checkpoint in folder.checkpoints():  # they belong to other pairs
            shutil.rmtree(checkpoint)
        make_folder_whole(folder.pairs, partial(_write_pairs, run, spin, cfg.sequence_len, real, sources, key))
    found = open_pairs(folder)
    say(f"iteration {number}: {found.stats['train'].described()}")
    if not len(found.train):
        raise SpinError(
            "no pair is left to train on (see the statistics above); where all responses equal the real ones the "
            "opponent already reproduces the data, and where all are over sequence_len, raise it"
        )
    return found


def open_pairs(folder: IterationDir) -> PairsOnDisk:
    """The pairs of an iteration that was prepared."""
    tables = {split: open_table(folder.pairs / f"{split}.arrow") for split in SPLITS}
    return PairsOnDisk(
        train=tables["train"],
        eval=tables["eval"] if len(tables["eval"]) else None,
        stats=read_stats(folder.pairs / "stats.json"),
        opponent_files={split: folder.pairs / f"opponent-{split}.safetensors" for split in SPLITS},
        weights=str((Shards(folder.synthetic).manifest() or {}).get("weights")),
    )


# --- responses ---------------------------------------------------------------------------------


def _draw(cfg: Any, run: RunDir, spin: SpinArgs, number: int, real: Real) -> Job:
    """Have vLLM draw this iteration's responses, from the merged model where it cannot serve the adapter."""
    options = spin.generation
    _warn_of_another_opponent(cfg, spin)
    prompts = _prompts(cfg, spin, number, real)
    requests = _requests(cfg, spin, number, prompts)
    count, digest = fingerprint_requests(requests())
    if left_out := sum(len(ids) for _, _, ids in prompts) - count // options.samples_per_prompt:
        warn(f"{left_out:,} prompts leave no room within spin.generation.max_model_len and are not played")
    sampling = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stop_token_ids": real.stop_tokens,
    }
    adapter = str(cfg.lora_model_dir) if cfg.adapter and cfg.lora_model_dir else None
    weights = fingerprint(filter(None, (str(cfg.base_model), adapter)), cfg.revision_of_model)
    job = Job(number, engine_arguments(cfg, spin), adapter, weights, sampling, count, digest)
    whole = run.iteration(number).opponent(weights)

    def draw(job: Job) -> None:
        def find_python() -> Path:  # asked only when there is something to draw
            python = vllm_python(options.python)
            _require_sound_opponent(cfg, adapter)
            require_space(run.root, _bytes_needed(cfg, spin, count, merges=adapter is not None and not job.adapter))
            if adapter and not job.adapter and not whole.exists():
                merge(cfg, Path(adapter), whole)
            return python

        generate(
            job,
            Shards(run.iteration(number).synthetic),
            requests,
            find_python,
            engines=options.engines,
            ray=options.engine == "ray",
            ray_address=options.ray_address,
        )

    merged = replace(job, engine=engine_arguments(cfg, spin, merged=whole), adapter=None)
    served = adapter is None or (served_by_vllm(Path(adapter)) and not whole.exists())
    try:
        draw(job if served else merged)
    except AdapterNotServedError as error:
        say(f"responses are drawn from the merged model, as vLLM cannot serve this adapter: {error}")
        draw(merged)
    for merged_opponent in run.iteration(number).path.glob("opponent*"):
        remove_whole(merged_opponent)
    return job


def _warn_of_another_opponent(cfg: Any, spin: SpinArgs) -> None:
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


def _requests(cfg: Any, spin: SpinArgs, number: int, prompts: list[Prompts]) -> Callable[[], Iterator[Request]]:
    """Gives every request of an iteration, as often as it is called."""
    options = spin.generation
    return partial(
        requests_for,
        prompts,
        iteration=number,
        seed=int(cfg.seed or 0) if options.seed is None else options.seed,
        samples=options.samples_per_prompt,
        sequence_len=min(cfg.sequence_len, options.max_model_len or cfg.sequence_len),
        max_tokens=options.max_tokens,
    )


def engine_arguments(cfg: Any, spin: SpinArgs, *, merged: Path | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the opponent, which may be a model with its adapter merged into it."""
    options = spin.generation
    arguments = {
        "model": str(merged or cfg.base_model),
        "revision": None if merged else cfg.revision_of_model,
        "trust_remote_code": bool(cfg.trust_remote_code),
        "skip_tokenizer_init": True,  # prompts and responses are token ids
        "generation_config": "vllm",  # else a model's own file changes the sampling
        "dtype": options.dtype or str(cfg.torch_dtype).removeprefix("torch."),
        "hf_overrides": dict(cfg.overrides_of_model_config) if cfg.overrides_of_model_config else None,
        "seed": int(cfg.seed or 0),
        "max_model_len": options.max_model_len or cfg.sequence_len,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        **options.vllm,
    }
    return {key: value for key, value in arguments.items() if value is not None}


def _require_sound_opponent(cfg: Any, adapter: str | None) -> None:
    """Refuse damaged weights before a GPU hour is spent on them. What comes from the hub was checked on its way."""
    base, code = Path(str(cfg.base_model)), bool(cfg.trust_remote_code)
    if base.is_dir():
        require_finite(check_weights(base, "model"))
        if "quantization_config" not in (base / "config.json").read_text(encoding="utf-8"):  # other tensors
            require_complete(base, trust_remote_code=code)
    if adapter:
        require_finite(check_weights(Path(adapter), "adapter_model"))
        require_complete_adapter(Path(adapter), str(base), revision=cfg.revision_of_model, trust_remote_code=code)


def _bytes_needed(cfg: Any, spin: SpinArgs, responses: int, *, merges: bool) -> Space:
    """What an iteration writes: surely the model at its end, at most also all these responses and checkpoints.

    Args:
        merges: the opponent is written before vLLM draws from it.
    """
    base = Path(str(cfg.base_model))
    writes_model = merges or not cfg.adapter or spin.adapter_chain == "merge"
    model = sum(file.stat().st_size for file in base.glob("*.safetensors")) if writes_model else 0
    tokens = responses * min(cfg.sequence_len, spin.generation.max_tokens or cfg.sequence_len)
    pairs = responses * (1 + spin.history) * 2 * cfg.sequence_len
    optimizer = 0 if cfg.save_only_model else 2 * model  # Adam's two moments
    checkpoints = 0 if cfg.save_strategy == "no" else 1 + (cfg.save_total_limit or 4)  # 4 is Axolotl's own
    return Space(sure=model, likely=model + 8 * tokens + 4 * pairs + checkpoints * (model + optimizer))


# --- pairs -------------------------------------------------------------------------------------


def _pairs_key(run: RunDir, sources: range, job: Job, spin: SpinArgs, cfg: Any) -> str:
    """What the pairs depend on."""
    manifests = [Shards(run.iteration(source).synthetic).manifest() or {} for source in sources]
    drawn = [[manifest.get("weights"), manifest.get("requests_sha256")] for manifest in manifests]
    parts = [drawn, job.sampling, spin.equal_pairs, cfg.sequence_len]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _has_pairs(folder: IterationDir, key: str) -> bool:
    file = folder.pairs / "key"
    return file.exists() and file.read_text(encoding="utf-8") == key


def _write_pairs(
    run: RunDir, spin: SpinArgs, sequence_len: int, real: Real, sources: range, key: str, folder: Path
) -> None:
    """Join this iteration's responses, and those of earlier ones for training, with the real ones."""
    stats = {}
    for split in SPLITS:
        examples = real.train if split == "train" else real.eval
        # The newest responses first; held-out prompts are judged on the newest alone.
        iterations = list(reversed(sources)) if split == "train" else [sources[-1]]
        stats[split] = build_pairs(
            examples if examples is not None else real.train,
            _responses(run, iterations, split),
            folder / f"{split}.arrow",
            end_tokens=real.stop_tokens,
            sequence_len=sequence_len,
            keep_equal=spin.equal_pairs == "keep",
        )
    write_stats(folder / "stats.json", stats)
    (folder / "key").write_text(key, encoding="utf-8")


def _responses(run: RunDir, iterations: list[int], split: str) -> Iterator[Synthetic]:
    for number in iterations:
        for response in Shards(run.iteration(number).synthetic).responses():
            if response["split"] == split:
                yield Synthetic(response["example"], number, response["tokens"], response["finish"] == "length")
