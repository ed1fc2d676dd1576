"""lm-evaluation-harness after every iteration: the tasks that `lm_eval_tasks` of Axolotl's plugin names.

Axolotl's own hook would run it in every rank, evaluate `hub_model_id` instead of the iteration, use float16 unless
`bf16` is set, and fail with adapters. So only its options are used.

An iteration without scores whose evaluation was interrupted is evaluated at the next start. One that failed is not, as
long as its log is there.
"""

import gc
import json
import math
import os
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import yaml
from axolotl.utils.dict import DictDefault

from spin_plugin.config.specs import LmEvalSpec, read_opponent
from spin_plugin.console import DISK_ERRORS, SpinError, say, warn
from spin_plugin.generation.engine import without_launcher
from spin_plugin.opponent.merge import merge, vllm_can_serve
from spin_plugin.run.atomic import remove_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.iteration import IterationDir
from spin_plugin.run.scores import shown_scores

# It must not outlive this process: it holds a model on the GPU on which the next iteration generates.
LM_EVAL = (
    "import os; from spin_plugin.run.processes import exit_with_parent; exit_with_parent(os.getppid()); "
    "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
)
DEFAULT_SHOTS = "default"


class Scores(NamedTuple):
    """What an evaluation adds to an iteration's entry in run.json."""

    lm_eval: dict[str, float]
    """By `task/metric`, or `task/metric/filter` where the task has filters; a standard error by `task/metric_stderr`.
    The task is named as it is listed: `gsm8k:5`, if with the number of examples in the prompt."""
    lower_is_better: list[str]
    """The names of those that should fall."""


def require_tasks(spec: LmEvalSpec) -> None:
    """Check before any work that lm-evaluation-harness is installed and knows the tasks.

    Raises:
        SpinError: it is not, or does not.
    """
    if find_spec("lm_eval") is None:
        raise SpinError("lm_eval_tasks: lm-evaluation-harness is not installed; run `pip install lm-eval`")
    from lm_eval.tasks import TaskManager

    known, unknown = TaskManager(), []
    for task in spec.tasks:
        name, _ = _with_shots(task)
        if not (_name_in(name) if _is_file(name) else known.match_tasks([name])):
            unknown.append(name)
    if unknown:
        raise SpinError(
            f"lm_eval_tasks: {', '.join(unknown)} not found; `lm-eval ls tasks` lists the known ones, and a task of "
            "your own is the path of a .yaml file"
        )


def evaluate_finished(run: RunDir, spec: LmEvalSpec | None) -> None:
    """Add scores to every finished iteration in run.json that has none.

    Args:
        run: the run directory, locked.
        spec: the tasks; None: nothing is evaluated.
    """
    state = run.read_state()
    if spec is None or state is None:
        return
    for number in run.unevaluated():
        say(f"iteration {number}: evaluating it with lm-evaluation-harness: {', '.join(spec.tasks)}")
        directory = run.iteration(number)
        try:
            scores = _evaluate(directory, spec)
        except SpinError as error:
            warn(
                f"iteration {number} was not evaluated: {error}; the run goes on; to evaluate it at the next start, "
                f"delete {directory.lm_eval_failure}"
            )
            continue
        state.finished[number] |= scores._asdict()
        run.write_state(state)
        shown = shown_scores(scores.lm_eval)
        say(f"iteration {number}: {', '.join(f'{name} {score}' for name, score in shown.items())}")


def _evaluate(directory: IterationDir, spec: LmEvalSpec) -> Scores:
    """Return an iteration's scores.

    Raises:
        SpinError: lm-evaluation-harness failed, or what is done for it.
    """
    remove_atomically(directory.lm_eval)
    gc.collect()  # the trained model is in reference cycles, and its memory is needed
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    try:
        with open(directory.lm_eval_log, "wb") as log, _model(directory) as model:
            for arguments in commands(spec, model, directory.lm_eval):
                _run(arguments, log)
        return read_scores(directory.lm_eval)
    except Exception as error:  # a merge can run out of memory, a results file can lack anything
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        os.replace(directory.lm_eval_log, directory.lm_eval_failure)
        if isinstance(error, SpinError):
            raise
        with open(directory.lm_eval_failure, "a", encoding="utf-8") as log:
            log.write(traceback.format_exc())
        raise SpinError(f"{type(error).__name__}: {str(error)[:300]}") from None


@contextmanager
def _model(directory: IterationDir) -> Iterator[dict[str, Any]]:
    """Yield lm-evaluation-harness's `model_args` for an iteration's model."""
    cfg = DictDefault(yaml.safe_load(directory.config.read_text(encoding="utf-8")))
    opponent, saved = read_opponent(cfg), str(directory.path)
    shared = {"dtype": opponent.dtype, "trust_remote_code": opponent.trust_remote_code}
    if not cfg.adapter:
        yield shared | {"pretrained": saved}
    elif directory.merged.is_dir():
        yield shared | {"pretrained": str(directory.merged)}
    elif vllm_can_serve(directory.path):  # unmerged, because a merge in 16 bits loses small movements
        base = {"pretrained": opponent.base_model, "revision": opponent.revision or "main"}
        yield shared | base | {"peft": saved, "tokenizer": saved}
    else:  # it resizes embeddings to the tokenizer's length, which a saved embedding or LM head does not fit
        merged = directory.path / ".lm_eval.tmp"
        merge(opponent, directory.path, merged, tokenizer=directory.path)
        try:
            yield shared | {"pretrained": str(merged)}
        finally:
            remove_atomically(merged)


def commands(spec: LmEvalSpec, model: Mapping[str, Any], results: Path) -> Iterator[list[str]]:
    """Yield the arguments of `lm_eval`, one command for all tasks with as many examples and the same directory.

    Args:
        spec: the tasks.
        model: `model_args`.
        results: the directory for the results, in which each number of shots has its own.
    """
    together: dict[tuple[str | None, str | None], list[str]] = defaultdict(list)
    for task in spec.tasks:
        name, shots = _with_shots(task)
        if _is_file(name):
            together[str(Path(name).parent), shots].append(_name_in(name))
        else:
            together[None, shots].append(name)
    for (directory, shots), names in together.items():
        arguments = ["run", "--model", "hf", "--model_args", json.dumps(model), "--tasks", ",".join(names)]
        output = results / (shots or DEFAULT_SHOTS)
        arguments += ["--batch_size", str(spec.batch_size), "--output_path", str(output)]
        arguments += ["--include_path", directory] if directory else []
        arguments += ["--num_fewshot", shots] if shots else []
        arguments += ["--apply_chat_template"] if spec.chat_template else []
        arguments += ["--fewshot_as_multiturn"] if spec.chat_template and spec.multiturn else []
        yield arguments


def read_scores(results: Path) -> Scores:
    """Read the results files that `commands` wrote; scores that are not finite are left out, since none ranks them."""
    scores: dict[str, float] = {}
    falling = []
    for file in sorted(results.rglob("results_*.json")):
        shots = file.relative_to(results).parts[0]
        content = json.loads(file.read_text(encoding="utf-8"))
        for task, values in content["results"].items():
            listed = task if shots == DEFAULT_SHOTS else f"{task}:{shots}"
            for key, value in values.items():
                metric, _, chosen = key.partition(",")
                # without a filter it is the task's alias or size; an error that is not estimated is "N/A"
                if chosen and isinstance(value, int | float) and math.isfinite(value):
                    name = "/".join([listed, metric] + ([chosen] if chosen != "none" else []))
                    scores[name] = float(value)
                    # None where the tasks of a group disagree
                    if content["higher_is_better"].get(task, {}).get(metric) is False:
                        falling.append(name)
    return Scores(scores, falling)


def _run(arguments: list[str], log: BinaryIO) -> None:
    """Run `lm_eval`, in one process, on the first GPU.

    Raises:
        SpinError: its exit code is not 0; names the last line of its output.
    """
    command = [sys.executable, "-c", LM_EVAL, *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=without_launcher(), check=False
    )
    if done.returncode:
        lines = Path(log.name).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        raise SpinError(f"lm_eval ended with exit code {done.returncode}: {last[:300]}")


def _with_shots(task: str) -> tuple[str, str | None]:
    """Split `task:5`, a task with five examples in its prompt."""
    name, _, shots = task.rpartition(":")
    return (name, shots) if name and shots.isdigit() else (task, None)


def _is_file(name: str) -> bool:
    return name.endswith(".yaml")  # the only suffix that lm-evaluation-harness looks for


def _name_in(file: str) -> str:
    """Return the name of the task or group that a YAML file defines.

    Raises:
        SpinError: it defines none.
    """
    from lm_eval.utils import load_yaml_config

    try:
        config = load_yaml_config(file, mode="simple")
    except (OSError, yaml.YAMLError) as error:
        raise SpinError(f"lm_eval_tasks: {file} cannot be read: {error}") from None
    name = isinstance(config, dict) and (config.get("group") or config.get("task"))
    if not isinstance(name, str):
        raise SpinError(f"lm_eval_tasks: {file} defines no `task`")
    return name
