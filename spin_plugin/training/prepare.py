"""One iteration up to training: tokenized data, the opponent's responses and the pairs, all on disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import Tensor

from spin_plugin.args import SpinArgs
from spin_plugin.config.plain import without_secrets
from spin_plugin.config.specs import OpponentSpec, read_data, read_opponent, read_training, read_vllm
from spin_plugin.console import SpinError, say, warn
from spin_plugin.data.initial import with_initial
from spin_plugin.data.pairs import PairStats, Synthetic, build_pairs, read_stats, write_stats
from spin_plugin.data.real import Real, prepare_real
from spin_plugin.data.table import open_table
from spin_plugin.generation.job import Job
from spin_plugin.generation.shards import Shards
from spin_plugin.objective.diagnosis import diagnose_pairs
from spin_plugin.objective.losses import LOSSES
from spin_plugin.opponent.hub import commit_of, pin
from spin_plugin.run.atomic import set_aside, write_atomically, write_dir_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir
from spin_plugin.training.generate import Generation
from spin_plugin.training.judged import Judged, compare_with_previous, generate_and_judge
from spin_plugin.training.loading import AxolotlSource, stored_dtype
from spin_plugin.training.precision import keeps_masters

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
    revision: str | None = None
    """Commit of a base model on the hub; all ranks load this one."""
    held_out_rows: Tensor | None = None
    """[examples] SFT row of each held-out prompt; None in runs that did not store it."""
    grouped: bool = False
    """Whether pairs of one prompt stand together; decided when the pairs are built, so a resume keeps the order."""

    def opponent_key(self, split: str) -> str:
        """Return what a split's opponent log-probs depend on: the opponent's weights and every token of the pairs."""
        pairs = self.opponent_files[split].with_name(f"{split}.arrow")
        with open(pairs, "rb") as content:
            return f"{self.weights}/{hashlib.file_digest(content, 'sha256').hexdigest()}"


def prepare_iteration(cfg: Any, run: RunDir, spin: SpinArgs, number: int) -> PairsOnDisk:
    """Do everything before training; reuse what is already on disk.

    Args:
        cfg: Axolotl's validated configuration.
        run: the run directory.
        spin: the `spin:` block for this iteration.
        number: the iteration.

    Raises:
        SpinError: the data is unusable, or vLLM is missing or exited.
        SystemExit: the judge's scores have ended the run.
    """
    directory = run.iteration(number)
    directory.path.mkdir(parents=True, exist_ok=True)
    pin(cfg, _base_revision(read_opponent(cfg), run, number))
    resolved = {key: value for key, value in without_secrets(cfg).items() if key != "spin_config"}
    write_atomically(directory.config, yaml.safe_dump(json.loads(json.dumps(resolved, default=str))))
    data, training = read_data(cfg), read_training(cfg)
    source = AxolotlSource(cfg)
    real = prepare_real(source, run, spin, data)
    sources = range(max(0, number - spin.history_iterations), number + 1)
    generation = Generation(
        run=run,
        number=number,
        spin=spin,
        vllm=read_vllm(cfg),
        opponent=read_opponent(cfg),
        data=data,
        training=training,
        has_masters=keeps_masters(training) and stored_dtype(cfg) in ("bfloat16", "float16"),
        real=real,
    )
    job, judged = generate_and_judge(generation, source.tokenizer(), sources)
    key = _pairs_key(run, sources, job, spin, data.sequence_len, judged)
    reason = _why_rebuild(directory, key)
    if judged and number:
        compare_with_previous(run, number, judged, spin, again=reason is not None)
    if reason:
        _set_training_aside(directory, number, reason)
        write = partial(_write_pairs, run, spin, data.sequence_len, real, sources, key, judged)
        write_dir_atomically(directory.pairs, write)
    found = open_pairs(directory)
    say(f"iteration {number}: {found.stats['train'].summary()}")
    if reason:  # those of pairs that are kept were reported when these were built
        _warn_of_findings(run, number, found.stats)
    if not len(found.train):
        raise SpinError(
            "no pairs left to train on (see the statistics above); if all responses are identical to the real ones, "
            "the opponent already reproduces the data; if all exceed sequence_len, raise it; if the judge finds all of "
            "them right, there is nothing left to learn from these prompts"
        )
    return found


def _warn_of_findings(run: RunDir, number: int, stats: Mapping[str, PairStats]) -> None:
    """Warn of what the statistics of new pairs show."""
    state = run.read_state()
    before = state.finished[number - 1]["pairs"] if state and number else None
    for finding in diagnose_pairs({split: value.as_dict() for split, value in stats.items()}, before):
        warn(str(finding))


def _base_revision(opponent: OpponentSpec, run: RunDir, number: int) -> str | None:
    """Return the commit of a base model on the hub; None if local. An adapter keeps the commit it was trained on."""
    if opponent.directory:
        return None
    before = (Shards(run.iteration(number - 1).synthetic).manifest() or {}) if number else {}
    return before.get("revision") or commit_of(opponent.base_model, opponent.revision)


def open_pairs(directory: IterationDir) -> PairsOnDisk:
    """Open the pairs of a prepared iteration."""
    tables = {split: open_table(directory.pairs / f"{split}.arrow") for split in SPLITS}
    manifest = Shards(directory.synthetic).manifest() or {}
    held_out = RunDir(directory.path.parent).real / "eval.arrow"
    examples = open_table(held_out) if held_out.exists() else None
    return PairsOnDisk(
        train=tables["train"],
        eval=tables["eval"] if len(tables["eval"]) else None,
        stats=read_stats(directory.pairs / "stats.json"),
        opponent_files={split: directory.pairs / f"opponent-{split}.safetensors" for split in SPLITS},
        held_out_rows=torch.tensor(examples["row"]) if examples and "row" in examples.column_names else None,
        grouped=(_stored_key(directory) or {}).get("grouped", False),
        weights=str(manifest.get("weights")),
        revision=manifest.get("revision"),
    )


# --- pairs -------------------------------------------------------------------------------------


def _pairs_key(
    run: RunDir, sources: range, job: Job, spin: SpinArgs, sequence_len: int, judged: Judged | None
) -> dict[str, Any]:
    """Return what the pairs depend on, under the names that messages use."""
    return {
        "the responses": [_identity(run, source) for source in sources],
        "the sampling": job.sampling,
        "spin.equal_pairs": spin.equal_pairs,
        "sequence_len": sequence_len,
        **({"iteration 0's responses": _identity(run, 0)} if _uses_initial(spin, sources) else {}),
        **({"spin.judge": judged.key} if judged else {}),
    }


def _identity(run: RunDir, number: int) -> list[Any]:
    """Return what identifies the responses of an iteration."""
    manifest = Shards(run.iteration(number).synthetic).manifest() or {}
    return [manifest.get("weights"), manifest.get("requests_sha256")]


def _uses_initial(spin: SpinArgs, sources: range) -> bool:
    """Whether the loss compares with iteration 0's responses, which iteration 0 itself does not."""
    return LOSSES[spin.loss_type].uses_initial and sources[-1] > 0


def _stored_key(directory: IterationDir) -> dict[str, Any] | None:
    """Return the key of the pairs on disk; None if it is missing or damaged."""
    try:
        stored = json.loads((directory.pairs / "key").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def _why_rebuild(directory: IterationDir, key: dict[str, Any]) -> str | None:
    """Return why the pairs must be built; None if those on disk are current."""
    stored = _stored_key(directory)
    if stored is None:
        return "the pairs it was trained on are missing"
    names = [name for name in stored | key if name != "grouped"]  # that only says how they were built
    differing = [name for name in names if stored.get(name) != key.get(name)]
    return f"this changed: {', '.join(differing)}" if differing else None


def _set_training_aside(directory: IterationDir, number: int, reason: str) -> None:
    """Set aside what was computed from other pairs: the last checkpoint and the opponent's log-probs."""
    checkpoint = directory.set_checkpoints_aside()
    if checkpoint is None and not any(directory.pairs.glob("opponent-*")):
        return
    kept = [checkpoint, set_aside(directory.pairs) if directory.pairs.is_dir() else None]
    warn(
        f"iteration {number}: pairs are rebuilt and training starts from scratch because {reason}; the old files are "
        f"kept in {' and '.join(str(path) for path in kept if path)} and can be deleted"
    )


def _write_pairs(
    run: RunDir,
    spin: SpinArgs,
    sequence_len: int,
    real: Real,
    sources: range,
    key: dict[str, Any],
    judged: Judged | None,
    directory: Path,
) -> None:
    """Join this iteration's responses, and for training those of earlier ones, with the real responses."""
    stats, has_initial = {}, _uses_initial(spin, sources)
    for split in SPLITS:
        examples = real.train if split == "train" else real.eval
        # Newest first; evaluation uses only the newest.
        iterations = list(reversed(sources)) if split == "train" else [sources[-1]]
        stats[split] = build_pairs(
            examples if examples is not None else real.train,
            _responses(run, iterations, split, judged, has_initial=has_initial),
            directory / f"{split}.arrow",
            end_tokens=real.stop_tokens,
            sequence_len=sequence_len,
            keep_equal=spin.equal_pairs == "keep" or split == "eval",  # held-out prompts must not be selected
            has_initial=has_initial,
            drop_at=judged.drop_at if judged else None,
            keep_right=split == "eval",
        )
    write_stats(directory / "stats.json", stats)
    train = open_table(directory / "train.arrow")
    grouped = spin.group_prompts == "auto" and len(train.unique("example")) < len(train)
    (directory / "key").write_text(json.dumps(key | {"grouped": grouped}), encoding="utf-8")


def _responses(
    run: RunDir, iterations: list[int], split: str, judged: Judged | None, *, has_initial: bool
) -> Iterator[Synthetic]:
    for number in iterations:
        own = _responses_of(run, number, split, judged)
        yield from with_initial(own, _responses_of(run, 0, split, None)) if has_initial else own


def _responses_of(run: RunDir, number: int, split: str, judged: Judged | None) -> Iterator[Synthetic]:
    responses = Shards(run.iteration(number).synthetic).responses()
    scored = zip(responses, judged.scores[number], strict=True) if judged else ((one, None) for one in responses)
    for response, score in scored:
        if response["split"] == split:
            truncated = response["finish"] == "length"
            yield Synthetic(response["example"], number, response["tokens"], truncated, score=score)
