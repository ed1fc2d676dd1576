"""The data as training will see it: tokenized into a temporary directory, at most a sample of it."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from spin_plugin.config.plain import plain
from spin_plugin.console import SpinError, report_error, say, warn
from spin_plugin.data.real import Real, prepare_real
from spin_plugin.doctor.checkup import Skipped
from spin_plugin.doctor.model import require_reachable
from spin_plugin.doctor.settings import Settings
from spin_plugin.generation.shards import Shards
from spin_plugin.run.directory import RunDir
from spin_plugin.training.generate import longest_response
from spin_plugin.training.loading import AxolotlSource

SAMPLE = 32 << 20  # bytes of a local dataset that are tokenized in some seconds
MANY = 0.05  # share of real responses that is worth a warning
PERCENTILES = (50, 95, 100)


@dataclass(frozen=True)
class Lengths:
    """Prompts and real responses in tokens, of the examples to train on."""

    prompt: np.ndarray
    real: np.ndarray
    held_out: int
    """Number of held-out prompts."""
    scale: float
    """Examples in the dataset for each one that was looked at."""

    @property
    def prompts(self) -> int:
        """Number of prompts to train on in the whole dataset."""
        return round(self.scale * len(self.prompt))


def real_data(settings: Settings) -> tuple[Real, float]:
    """Return the run's examples, those of a new run tokenized in a temporary directory, and the factor that a sample
    stands for.

    Args:
        settings: the configuration, with a temporary directory as `cfg.output_dir`.

    Raises:
        SpinError: the data is unusable.
        Skipped: it is on the hub, out of reach.
    """
    lowered = settings.lowered
    spin = lowered.spin.at(0)
    if lowered.run.holds_responses():
        if (lowered.run.real / "meta.json").exists():
            return prepare_real(AxolotlSource(settings.cfg), lowered.run, spin, settings.data), 1.0
        warn(f"{lowered.run.real}: missing although there are responses; training will tokenize the data again")
    require_reachable(settings)
    cfg, scale = sampled(settings.cfg)
    try:
        real = prepare_real(AxolotlSource(cfg), RunDir(Path(cfg.output_dir)), spin, settings.data)
    except SpinError as error:
        if elsewhere := remote_paths(cfg):
            raise Skipped(f"{', '.join(elsewhere)}: not in the cache, and not downloaded here ({error})") from None
        raise
    if scale > 1:
        say(f"a sample: 1 of {scale:.0f} rows was looked at, so numbers of prompts are estimates")
    return real, scale


def sampled(cfg: Any) -> tuple[Any, float]:
    """Return a configuration that loads at most about `SAMPLE` bytes of each local dataset, and the factor that
    numbers of rows must be multiplied by."""
    size = sum(local_bytes(plain(entry)) for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])])
    factor = math.ceil(size / SAMPLE)
    if factor <= 1:
        return cfg, 1.0
    smaller = copy.deepcopy(cfg)
    for entry in [*(smaller.datasets or []), *(smaller.test_datasets or [])]:
        entry["shards"] = factor * (entry.get("shards") or 1)
    if smaller.val_set_size and smaller.val_set_size > 1:  # a number of rows, not a fraction
        smaller.val_set_size = max(2, round(smaller.val_set_size / factor))  # 1 would be all rows
    return smaller, float(factor)


def local_bytes(dataset: Mapping[str, Any]) -> int:
    """Return the size of a dataset's files, those of its directory unless `data_files` names some; 0 if they are
    elsewhere."""
    place, named = Path(dataset["path"]), dataset.get("data_files") or []
    if named:
        patterns = [str(place / name) for name in ([named] if isinstance(named, str) else named)]
        files: Iterable[Path] = [Path(file) for pattern in patterns for file in glob(pattern, recursive=True)]
    else:
        files = [place] if place.is_file() else place.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def remote_paths(cfg: Any) -> list[str]:
    """Return the datasets that are not on this machine's disk."""
    paths = [str(plain(entry)["path"]) for entry in [*(cfg.datasets or []), *(cfg.test_datasets or [])]]
    return [path for path in paths if not Path(path).exists()]


def check_lengths(settings: Settings, real: Real, scale: float) -> Lengths:
    """The lengths of prompts and real responses, and whether synthetic ones may become as long."""
    found = Lengths(
        prompt=lengths(real.train, "prompt"),
        real=lengths(real.train, "real"),
        held_out=round(scale * len(real.eval)) if real.eval is not None else 0,
        scale=scale,
    )
    for name, values in (("prompts", found.prompt), ("real responses", found.real)):
        low, high, most = np.percentile(values, PERCENTILES)
        say(f"{name}: {low:.0f} tokens in the median, 95% at most {high:.0f}, longest {most:.0f}")
    _check_limits(settings, real, found)
    return found


def lengths(examples: Dataset, column: str) -> np.ndarray:
    """Return the number of tokens of each of the [N] entries of a column."""
    import pyarrow.compute as pc

    return pc.list_value_length(examples.data.column(column)).to_numpy()


def max_tokens_of(settings: Settings, real: Real) -> int:
    """Return the longest synthetic response in tokens."""
    return settings.spin.generation.max_tokens or longest_response(real.train, settings.data.sequence_len)


def _check_limits(settings: Settings, real: Real, found: Lengths) -> None:
    limit = max_tokens_of(settings, real)
    window = settings.vllm.max_model_len or settings.data.sequence_len
    key = "spin.generation.max_tokens" if settings.spin.generation.max_tokens else "the default of max_tokens"
    longer = float(np.mean(found.real > limit))
    stated = f"{key}: {limit:,} tokens, less than {longer:.0%} of the real responses; synthetic ones will be truncated"
    if longer > 0.5:
        report_error(f"{stated}, so most pairs teach length only; raise it")
    elif longer > MANY:
        warn(f"{stated}; raise it")
    unfit = float(np.mean(found.prompt + found.real > window))
    if unfit > MANY:
        warn(f"vllm.max_model_len: {unfit:.0%} of prompts with their real responses exceed {window:,} tokens; raise it")
    say(f"synthetic responses: at most {limit:,} tokens, prompt and response {window:,}")


def one_pair(settings: Settings, real: Real, tokenizer: Any) -> dict[str, Any]:
    """Return an example in full: `prompt` and `real`, and `synthetic` if one was generated; each with its number of
    tokens, its text with special tokens, and whether it is trained on."""
    response = _first_response(settings)
    row = real.train[response["example"] if response else 0]
    sides = {"prompt": row["prompt"], "real": row["real"]} | ({"synthetic": response["tokens"]} if response else {})
    return {
        name: {"tokens": len(tokens), "trained": name != "prompt", "text": tokenizer.decode(tokens)}
        for name, tokens in sides.items()
    }


def _first_response(settings: Settings) -> dict[str, Any] | None:
    """Return the newest iteration's first response on disk."""
    for number in (settings.number, settings.number - 1):
        shards = Shards(settings.lowered.run.iteration(number).synthetic)
        if shards.shard(0).exists():
            return next((one for one in shards.read(0) if one["split"] == "train"), None)
    return None
