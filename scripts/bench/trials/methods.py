"""The methods: from a task to the scores on its test questions, and the compute that they took."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.compute import list_value_length
from transformers import AutoTokenizer
from trials.sweep import candidates, percent
from trials.task import Scores, Sweep, Task
from trials.unit import Found, Unit, checkpoints, once, run, train

from spin_plugin.data.table import open_table
from spin_plugin.generation.shards import Shards
from spin_plugin.run.directory import RunDir

Method = Callable[[Task, Unit], Found]
TRAINED = 3
"""Units of compute of a token that is trained on: forward and backward. Scored, prefilled or generated, it costs 1."""
REFERENCE = "spin"
"""The method whose compute is the limit of all sweeps."""


def result(scores: Scores, compute: int, **more: Any) -> Found:
    """Return a unit's content: mean scores in percent, compute, and each question's scores."""
    rounded = {name: [round(value, 5) for value in values] for name, values in scores.items()}
    return {"scores": percent(scores), "compute": compute, **more, "questions": rounded}


def start(task: Task, unit: Unit) -> Found:
    """The SFT model that all methods start from."""
    dev = percent(task.score(task.start, "dev"))
    shown = {"sweep": task.start_sweep(), "dev": dev, "other": task.other(task.start)}
    return result(task.score(task.start, "test"), 0, **shown)


# --- SPIN ----------------------------------------------------------------------------------------


def spin(*, times: float = 1, decay: bool = False, judge: bool = False, **block: Any) -> Method:
    """All iterations of SPIN; the last one counts.

    Args:
        times: of the task's learning rate.
        decay: use three times the task's learning rate in the first third of the iterations, it, then a third of it.
        judge: leave out pairs whose synthetic response the task's judge calls right.
        block: keys of the `spin:` block.
    """

    def method(task: Task, unit: Unit) -> Found:
        directory = task.directory / unit.method
        config = task.spin
        config["learning_rate"] = round(times * float(config["learning_rate"]), 12)
        own = block | ({"judge": task.judge} if judge else {})
        if decay:
            own["schedule"] = decaying(float(config["learning_rate"]), config["spin"]["iterations"])
        config["spin"] = config["spin"] | {"stop": "off"} | own
        output = RunDir(train(directory, config, "spin", "train", "--verbose"))
        entries, compute, curve = _entries(output), 0, []
        for number, entry in enumerate(entries):
            compute += spin_compute(output, number, entry["stages"]["train"]["tokens"])
            model = output.iteration(number).path
            scores = task.score(model, "test")
            curve.append({"scores": percent(scores), "dev": percent(task.score(model, "dev")), "compute": compute})
        shown = {"curve": curve, "settings": own, "iterations": entries, "other": task.other(model)}
        return result(scores, compute, **shown)

    return method


def decaying(rate: float, iterations: int) -> list[dict[str, float]]:
    """Return `spin.schedule` for three times a learning rate, the rate itself and a third of it."""
    return [{"learning_rate": round(3 * rate / 3 ** (3 * number // iterations), 12)} for number in range(iterations)]


def _entries(output: RunDir) -> list[Found]:
    """Return what run.json says of each iteration that is worth keeping."""
    state = output.read_state()
    assert state is not None
    kept = ("pairs", "metrics", "held_out", "judge", "agreement", "divergence", "stages", "findings")
    return [{name: entry[name] for name in kept if name in entry} for entry in state.finished]


def spin_compute(output: RunDir, number: int, trained: int) -> int:
    """Count an iteration's compute: every response generated, every pair scored once, and training.

    Args:
        output: the run.
        number: the iteration.
        trained: tokens of all training steps.
    """
    directory = output.iteration(number)
    real = {split: open_table(output.real / f"{split}.arrow") for split in ("train", "eval")}
    prompts = {split: _lengths(table, "prompt") for split, table in real.items()}
    generated = sum(
        int(prompts[response["split"]][response["example"]]) + len(response["tokens"])
        for response in Shards(directory.synthetic).responses()
    )
    # held-out pairs are scored before and after training, those of iteration 0 again for the divergence
    scored = row_tokens(directory.pairs / "train.arrow") + 2 * row_tokens(directory.pairs / "eval.arrow")
    if number:
        scored += row_tokens(output.iteration(0).pairs / "eval.arrow")
    return generated + scored + TRAINED * trained


def row_tokens(pairs: Path) -> int:
    """Count the tokens that a pass over the pairs computes: prompt and real response once for each prompt."""
    table = open_table(pairs)
    first = np.unique(table.data.column("example").to_numpy(), return_index=True)[1]
    shared = _lengths(table, "prompt") + _lengths(table, "real")
    own = table.data.column("length").to_numpy() - shared
    return int(shared[first].sum() + own.sum())


def _lengths(table: Any, column: str) -> np.ndarray:
    return np.asarray(list_value_length(table.data.column(column)).to_numpy())


# --- sweeps: SFT and its relatives ----------------------------------------------------------------


def higher(sweep: Sweep, times: int) -> Sweep:
    """Return the sweep, or, for `times` above 1, one of only this many times its highest learning rate, at any length.

    If the best learning rate is the sweep's highest, or the best run its longest, a better one may lie outside.
    """
    if times == 1:
        return sweep
    return replace(sweep, learning_rates=(round(times * max(sweep.learning_rates), 12),), epochs=())


def sft(*, times: int = 1, **overrides: Any) -> Method:
    """More SFT: the best checkpoint of a sweep, chosen on the dev split among those up to SPIN's compute.

    Args:
        times: see `higher`.
        overrides: keys of the configuration.
    """

    def method(task: Task, unit: Unit) -> Found:
        return swept(task, unit, higher(task.sweep, times), task.sft | overrides, TRAINED * task.tokens)

    return method


def dpo(*, times: int = 1) -> Method:
    """DPO by Axolotl on one sample for each prompt: those of SPIN's iteration 0. The best checkpoint of a sweep.

    Args:
        times: see `higher`.
    """

    def method(task: Task, unit: Unit) -> Found:
        sampled = RunDir(train(task.directory / "sampled", task.spin, "preprocess"))  # generates, and stops there
        pairs = list(open_table(sampled.iteration(0).pairs / "train.arrow"))
        # equal responses have no gradient; they were generated all the same
        unequal = [pair for pair in pairs if pair["synthetic"] != pair["real"]]
        data = task.directory / unit.method / "pairs.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in preferences(task, unequal)), encoding="utf-8")
        common = task.sft
        config = common | {
            "pad_to_multiple_of": None,  # with it, Axolotl 0.21's collator does not fit TRL 1.14
            "group_by_length": None,
            # a pair is two sequences
            "micro_batch_size": common["micro_batch_size"] // 2,
            "gradient_accumulation_steps": common["gradient_accumulation_steps"] * 2,
            "rl": "dpo",
            "rl_beta": task.spin["spin"]["beta"],
            "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template.default", "split": "train"}],
        }
        sampling = sum(len(pair["prompt"]) + len(pair["synthetic"]) for pair in pairs)
        return swept(task, unit, higher(task.dpo_sweep, times), config, dpo_epoch(unequal), sampling)

    return method


def dpo_epoch(pairs: Sequence[Mapping[str, Any]]) -> int:
    """Count an epoch's compute: each pair is two sequences, which the reference model scores in every epoch."""
    tokens = sum(2 * len(pair["prompt"]) + len(pair["real"]) + len(pair["synthetic"]) for pair in pairs)
    return (TRAINED + 1) * tokens


def preferences(task: Task, pairs: Iterable[Mapping[str, Any]]) -> Iterator[Found]:
    """Yield rows of preference data, the real response being the chosen one."""
    tokenizer = AutoTokenizer.from_pretrained(task.start)
    asked = (row[:-1] for row in task.rows)
    prompts = {
        tuple(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)): prompt
        for prompt in asked
    }
    for pair in pairs:
        chosen, rejected = (
            {"role": "assistant", "content": tokenizer.decode(pair[side], skip_special_tokens=True)}
            for side in ("real", "synthetic")
        )
        yield {"messages": prompts[tuple(pair["prompt"])], "chosen": chosen, "rejected": rejected}


def sdft(*, times: int = 1) -> Method:
    """SDFT by TRL. The best checkpoint of a sweep.

    Args:
        times: see `higher`.
    """

    def method(task: Task, unit: Unit) -> Found:
        limit = reference_compute(unit)[-1]
        sweep = higher(task.sdft_sweep, times)
        found = []
        for rate in sweep.learning_rates:
            directory = task.directory / unit.method / f"{rate:g}"
            output = directory / "run"
            own = ["--learning-rate", rate, "--limit", limit, "--seed", task.seed]
            own += ["--checkpoints", sweep.checkpoints, *task.sdft]
            with once(directory, " ".join(map(str, own))) as needed:
                if needed:
                    shutil.rmtree(output, ignore_errors=True)
                    script = [sys.executable, Path(__file__).with_name("sdft.py"), task.start, task.data, output]
                    run([*script, *map(str, own)], directory / "log")
            for compute, model in checkpoints(output, "compute").items():
                settings = {"learning_rate": rate, "compute": compute}
                found.append(settings | {"dev": percent(task.score(model, "dev")), "model": str(model)})
        return choose(task, unit, found)

    return method


def swept(task: Task, unit: Unit, sweep: Sweep, config: Found, epoch: int, before: int = 0) -> Found:
    """Train all runs of a sweep and choose a checkpoint.

    Args:
        task: the task.
        unit: the unit that runs.
        sweep: the runs.
        config: their configuration, without learning rate and length.
        epoch: compute of an epoch.
        before: compute before the first epoch.
    """
    costs = {"epoch": epoch, "before": before, "limit": reference_compute(unit)[-1]}
    return choose(task, unit, list(candidates(task, task.directory / unit.method, sweep, config, **costs)))


def reference_compute(unit: Unit) -> list[int]:
    """Return SPIN's compute after each iteration.

    Raises:
        SystemExit: SPIN has not run.
    """
    reference = Unit(unit.task, REFERENCE, unit.seed, unit.results)
    if not reference.file.exists():
        raise SystemExit(f"evidence: {unit.method} needs the compute of {REFERENCE}: run that method first")
    return [point["compute"] for point in reference.read()["curve"]]


def choose(task: Task, unit: Unit, found: list[Found]) -> Found:
    """Choose a checkpoint on the dev split, for each score that is compared.

    Args:
        task: the task.
        unit: the unit that runs.
        found: the candidates apart from the start: settings, compute up to SPIN's, scores on the dev split, model.
    """
    budgets = reference_compute(unit)
    found = [{"compute": 0, "dev": percent(task.score(task.start, "dev")), "model": str(task.start)}, *found]
    tested: dict[str, Scores] = {}

    def test(candidate: Found) -> Scores:
        if candidate["model"] not in tested:
            tested[candidate["model"]] = task.score(Path(candidate["model"]), "test")
        return tested[candidate["model"]]

    def best(score: str, budget: int) -> Found:
        affordable = [candidate for candidate in found if candidate["compute"] <= budget]
        return max(affordable, key=lambda candidate: candidate["dev"][score])

    chosen = {score: best(score, budgets[-1]) for score in task.compared}
    questions = {score: test(candidate)[score] for score, candidate in chosen.items()}
    curve = [
        {"compute": budget, "scores": {score: percent(test(best(score, budget)))[score] for score in task.compared}}
        for budget in budgets
    ]
    best_found = {score: candidate | {"test": percent(test(candidate))} for score, candidate in chosen.items()}
    other = task.other(Path(chosen[task.compared[0]]["model"]))
    shown = {"best": best_found, "curve": curve, "candidates": found, "limit": budgets[-1], "other": other}
    for candidate in (*found, *best_found.values()):
        candidate.pop("model", None)
    return result(questions, max(one["compute"] for one in chosen.values()), **shown)


METHODS: dict[str, Method] = {
    "start": start,
    "spin": spin(),
    "sft": sft(),
    "sft-high": sft(times=3),
    "sft-higher": sft(times=9),
    "dft": sft(use_dft=True),
    "dft-high": sft(times=3, use_dft=True),
    "dft-higher": sft(times=9, use_dft=True),
    "dpo": dpo(),
    "dpo-high": dpo(times=3),
    "dpo-higher": dpo(times=9),
    "sdft": sdft(),
    "sdft-high": sdft(times=3),
    "spin-decay": spin(decay=True),
    "spin-decay-space": spin(decay=True, loss_type="space"),
    "spin-low": spin(times=0.2),
    "spin-history0": spin(history_iterations=0),
    "spin-judge": spin(judge=True),
    "spin-judge-long": spin(judge=True, iterations=6),
    "spin-judge-sft_weight": spin(judge=True, sft_weight=5.0),
    "spin-judge-many": spin(judge=True, generation={"num_generations": 8, "temperature": 1.3}),
    "spin-judge-many-sft_weight": spin(
        judge=True, sft_weight=5.0, generation={"num_generations": 4, "temperature": 1.3}
    ),
    "spin-judge-many-sft_weight-fast": spin(
        times=3, judge=True, sft_weight=5.0, generation={"num_generations": 4, "temperature": 1.3}
    ),
    "spin-space": spin(loss_type="space"),
    "spin-real_penalty": spin(real_penalty=5.0),
    "spin-sft_weight": spin(sft_weight=5.0),
    "spin-sft_weight-fast": spin(times=3, sft_weight=5.0),
}
