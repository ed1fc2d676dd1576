"""Write an iteration's model or adapter to a directory of its own: only what is needed to serve it, and its card."""

import hashlib
import shutil
from pathlib import Path

import yaml

from spin_plugin.config.specs import read_opponent
from spin_plugin.console import SpinError
from spin_plugin.export.card import model_card
from spin_plugin.opponent.hub import commit_of
from spin_plugin.opponent.merge import merge
from spin_plugin.opponent.weights import facts_of, require_finite
from spin_plugin.run.atomic import write_dir_atomically
from spin_plugin.run.checkpoint import check_model_dir
from spin_plugin.run.directory import RunDir, model_files
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.state import RunState


def export(run: RunDir, state: RunState, number: int, target: Path, *, merged: bool) -> None:
    """Write the model of a finished iteration, or its adapter, with tokenizer and card.

    With `adapter_chain: merge` it is always the merged model, because its adapter belongs to a model of this run.

    Args:
        run: the run directory.
        state: its state.
        number: the iteration.
        target: written atomically; must not exist, or be empty.
        merged: merge an adapter into its base model.

    Raises:
        SpinError: the model is damaged, `target` is in use, or there is nothing to merge.
    """
    iteration = run.iteration(number)
    chained = iteration.merged.is_dir()
    source = iteration.merged if chained else iteration.path
    adapter = (source / "adapter_config.json").is_file()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SpinError(f"{target}: exists; use a new directory")
    if merged and not adapter and not chained:
        raise SpinError("--merge: this run trains all weights, so there is nothing to merge; leave it out")
    weights = check_model_dir(source, adapter=adapter)
    require_finite(weights, run.weights)

    def fill(directory: Path) -> None:
        if merged and adapter:
            _merge(iteration, directory)
        else:
            _copy(source, weights, directory, run.weights)
        card = model_card(state, number, adapter=adapter and not merged)
        (directory / "README.md").write_text(card, encoding="utf-8")

    write_dir_atomically(target.resolve(), fill)


def _merge(iteration: IterationDir, target: Path) -> None:
    from axolotl.utils.dict import DictDefault

    opponent = read_opponent(DictDefault(yaml.safe_load(iteration.config.read_text(encoding="utf-8"))))
    if opponent.directory is None:
        commit_of(opponent.base_model, opponent.revision)  # says so if it is neither on the hub nor in the cache
    merge(opponent, iteration.path, target, tokenizer=iteration.path)


def _copy(source: Path, weights: list[Path], target: Path, cache: Path) -> None:
    """Copy a model, and compare the digests of its weights with those known of the run.

    Raises:
        SpinError: a copy differs.
    """
    for file in model_files(source):
        shutil.copyfile(file, target / file.name)
    for file, facts in zip(weights, facts_of(weights, cache), strict=True):
        with open(target / file.name, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != facts.sha256:
                raise SpinError(f"{target / file.name}: differs from {file}; check the disk, then rerun the command")
