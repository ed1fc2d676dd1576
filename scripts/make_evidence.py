"""Write what scripts/bench/evidence.py has found into the docs: summary.json, tables and figures.

    python scripts/make_evidence.py           # write
    python scripts/make_evidence.py --check   # exit 1 if anything is outdated

A table replaces what is between `<!-- evidence: NAME -->` and `<!-- end -->` in a Markdown file; the text around it is
written by hand.
"""

import argparse
import json
import re
import sys
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "bench"))

from trials.bootstrap import paired_bootstrap
from trials.figure import Curve, figure
from trials.unit import RESULTS, ROOT

SUMMARY = RESULTS / "summary.json"
BASELINE = "sft"
OTHERWISE = "sft-otherwise"
"""The checkpoint of the baseline's first sweep that is best by the second of the compared scores, on the dev split."""
EXTENSIONS = ("", "-high", "-higher")
"""After a method's name: its sweep, and the same with higher learning rates. Together they are one sweep."""
SHOWN = "spin-decay"
"""The best SPIN, shown by operation."""
MAIN = ("start", BASELINE, OTHERWISE, "spin", SHOWN)
"""The rows of the short table."""
PAGES = (ROOT / "README.md", ROOT / "docs/evidence.md")
BLOCK = re.compile(r"(<!-- evidence: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LABELS = {
    "start": "SFT, the start",
    "sft": "more SFT",
    "dft": "DFT",
    "dpo": "DPO, once",
    "sdft": "SDFT",
    "spin": "SPIN",
    "spin-decay": "SPIN, decaying learning rate",
    "spin-decay-space": "SPIN, decaying learning rate, `loss_type: space`",
    "spin-low": "SPIN, a fifth of the learning rate",
    "spin-history0": "SPIN, `history_iterations: 0`",
    "spin-judge": "SPIN, `judge`",
    "spin-judge-long": "SPIN, `judge`, 6 iterations",
    "spin-judge-sft_weight": "SPIN, `judge` and `sft_weight: 5`",
    "spin-judge-many": "SPIN, `judge`, 8 responses a prompt",
    "spin-judge-many-sft_weight": "SPIN, `judge`, `sft_weight: 5`, 4 responses a prompt",
    "spin-judge-many-sft_weight-fast": "SPIN, `judge`, `sft_weight: 5`, 3 × the learning rate",
    "spin-space": "SPIN, `loss_type: space`",
    "spin-real_penalty": "SPIN, `real_penalty: 5`",
    "spin-sft_weight": "SPIN, `sft_weight: 5`",
    "spin-sft_weight-fast": "SPIN, `sft_weight: 5`, 3 × the learning rate",
}
DOMAINS = {"out_of_domain": "out-of-domain", "greedy_out_of_domain": "the same, greedy", "in_domain": "in-domain"}
COLUMNS = {"tiny": DOMAINS, "sql": {"sampled": "sampled", "greedy": "greedy"}, "scan": DOMAINS}
"""The scores of each task's tables; the first decides."""
OTHER = {"chat": "own chat, nats per token"}
"""What else a model has kept or lost."""
SHARED = ("sql", "scan")
"""The tasks whose seeds have the same questions."""
OPERATIONS = ("copy", "reverse", "sort", "rotate", "swap")
"""Of the tiny task; the SFT data has the first two."""
Units = dict[str, dict[int, dict[str, Any]]]
"""By method and seed, a unit's JSON."""


def read(task: str) -> Units:
    """Return the units of a task by method, without methods that have yet to run on some seed of more SFT."""
    units: Units = {}
    for method in (label + extension for label in LABELS for extension in EXTENSIONS):
        files = sorted(RESULTS.glob(f"{task}-{method}-*.json"))
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        units[method] = {unit["seed"]: unit for unit in found if unit["method"] == method}
    seeds = sorted(units[BASELINE])
    complete = [method for method in units if seeds and units[method].keys() >= set(seeds)]
    return {method: {seed: units[method][seed] for seed in seeds} for method in complete}


def joined(units: Units) -> Units:
    """Make one method of a method's sweeps."""
    found: Units = {}
    for method in LABELS:
        sweeps = [units[method + extension] for extension in EXTENSIONS if method + extension in units]
        if method in units:
            found[method] = {seed: reduce(stronger, (sweep[seed] for sweep in sweeps)) for seed in units[method]}
    return found


def stronger(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Join two sweeps: for each score, and each budget, the one that the dev split chooses."""

    def chosen(score: str, budget: float) -> bool:
        """Return whether the dev split chooses the first sweep."""
        dev = [
            max(entry["dev"][score] for entry in sweep["candidates"] if entry["compute"] <= budget)
            for sweep in (one, other)
        ]
        return dev[0] >= dev[1]

    better = {score: one if chosen(score, one["limit"]) else other for score in one["best"]}
    found = one | {"curve": [], "candidates": one["candidates"] + other["candidates"]}
    for part in ("best", "questions"):
        found[part] = {score: sweep[part][score] for score, sweep in better.items()}
    found["other"] = next(iter(better.values())).get("other", {})
    for here, there in zip(one["curve"], other["curve"], strict=True):
        budget = here["compute"]
        scores = {score: (here if chosen(score, budget) else there)["scores"][score] for score in one["best"]}
        found["curve"].append({"compute": budget, "scores": scores})
    return found


def compared(units: Units) -> tuple[str, ...]:
    """Return the scores for which the sweeps choose a checkpoint; the first decides."""
    return tuple(next(iter(units[BASELINE].values()))["best"])


def summary(task: str, units: Units, first_sweep: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds of each method, and its difference from more SFT.

    Args:
        task: its name.
        units: by method, its sweeps joined.
        first_sweep: the baseline's first sweep, by seed. By a score at its ceiling, the joined one is chosen by chance.
    """
    first, second = compared(units)
    found: dict[str, Any] = {}
    for method, seeds in units.items():
        # a sweep's checkpoint is chosen for a score
        models = [unit["best"][first] if "best" in unit else unit for unit in seeds.values()]
        found[method] = row(task, models) | {"seeds": sorted(seeds)}
        others = [unit.get("other", {}) for unit in seeds.values()]
        found[method]["other"] = {name: round(fmean(other[name] for other in others), 3) for name in others[0]}
        if method == BASELINE:
            found[OTHERWISE] = row(task, [unit["best"][second] for unit in first_sweep.values()])
        else:
            found[method]["differences"] = {
                name: difference(seeds, units[BASELINE], name, shared=task in SHARED) for name in (first, second)
            }
    for entry in found.values():
        entry["share"] = round(entry["compute"] / found["spin"]["compute"], 2)
    return found


def row(task: str, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean scores and compute of the models of all seeds: units, or chosen checkpoints of sweeps."""
    each = [model.get("test") or model["scores"] for model in models]
    return {
        "scores": {name: round(fmean(scores[name] for scores in each), 2) for name in COLUMNS[task]},
        "compute": round(fmean(model["compute"] for model in models)),
    }


def chosen_otherwise(units: Units) -> dict[str, list[float]]:
    """Return the first score of each sweep's checkpoints that the second score's dev split chooses, mean and range."""
    first, second = compared(units)
    found = {}
    for sweep in (BASELINE + extension for extension in EXTENSIONS):
        if sweep in units:
            values = [unit["best"][second]["test"][first] for unit in units[sweep].values()]
            found[sweep] = [round(value, 1) for value in (fmean(values), min(values), max(values))]
    return found


def fixed_elsewhere(units: Units) -> dict[str, dict[str, float]]:
    """Return dev scores of more SFT with, in each seed, the settings best by the first score on the other seeds.

    That is how SPIN's settings were found: on other seeds, by that score. Beside it SPIN's dev scores; all are means.
    """
    scores = compared(units)
    by_settings: dict[tuple[float, ...], dict[int, dict[str, float]]] = {}
    for seed, unit in units[BASELINE].items():
        for one in unit["candidates"]:
            if one["compute"]:  # not the start
                settings = (float(f"{one['learning_rate']:g}"), one["epochs"], one["step"])
                by_settings.setdefault(settings, {})[seed] = one["dev"]
    found = {
        method: [units[method][seed]["curve"][-1]["dev"] for seed in units[method]]
        for method in ("spin", SHOWN)
        if method in units
    }
    usable = [devs for devs in by_settings.values() if devs.keys() == units[BASELINE].keys()]
    found[BASELINE] = []
    for seed in units[BASELINE]:
        best = max(usable, key=lambda devs: fmean(dev[scores[0]] for other, dev in devs.items() if other != seed))
        found[BASELINE].append(best[seed])
    return {
        method: {score: round(fmean(dev[score] for dev in devs), 2) for score in scores}
        for method, devs in found.items()
    }


def difference(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], score: str, *, shared: bool
) -> dict[str, Any]:
    """Return the mean difference in points, its interval, and each seed's."""
    pairs = {
        seed: [a - b for a, b in zip(unit["questions"][score], theirs[seed]["questions"][score], strict=True)]
        for seed, unit in ours.items()
    }
    mean, low, high = (round(100 * value, 2) for value in paired_bootstrap(list(pairs.values()), shared=shared))
    each = {str(seed): round(100 * fmean(pair), 2) for seed, pair in pairs.items()}
    return {"mean": mean, "interval": [low, high], "seeds": each}


def table(task: str, found: dict[str, Any]) -> str:
    """Return the table of all methods."""
    columns = COLUMNS[task]
    first, second = found["spin"]["differences"]
    labels = LABELS | {
        BASELINE: f"{LABELS[BASELINE]}, chosen by its {columns[first]} score",
        OTHERWISE: f"{LABELS[BASELINE]}, chosen by its {columns[second]} score",
    }
    others = found[BASELINE]["other"]
    names = [*columns.values(), f"{columns[first]}, difference from more SFT", *(OTHER[name] for name in others)]
    lines = [f"| method | {' | '.join(names)} | compute |", f"|---|{'---|' * len(names)}---|"]
    for method, entry in found.items():
        cells = [f"{entry['scores'][name]:.1f}" for name in columns]
        gain = ""
        if "differences" in entry:
            one = entry["differences"][first]
            low, high = one["interval"]
            gain = f"{signed(one['mean'])} ({signed(low)} to {signed(high)})"
        kept = entry.get("other", {})
        cells += [gain, *(f"{kept[name]:.2f}".replace("-", "−") if name in kept else "" for name in others)]
        lines.append(f"| {labels[method]} | {' | '.join(cells)} | {entry['share']:.2f} |")
    return "\n".join(lines) + "\n"


def signed(value: float) -> str:
    """Format points with a sign, a real minus."""
    return f"{value:+.1f}".replace("-", "−")


def by_seed(found: dict[str, Any]) -> str:
    """Return the table of each seed's difference from more SFT."""
    seeds = found[BASELINE]["seeds"]
    lines = [f"| seed | {' | '.join(map(str, seeds))} |", f"|---|{'---|' * len(seeds)}"]
    for method, entry in found.items():
        if "differences" in entry:
            first = next(iter(entry["differences"].values()))
            cells = map(signed, first["seeds"].values())
            lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def operations(units: Units) -> dict[str, dict[str, dict[str, float]]]:
    """Return each seed's scores by operation: start, more SFT as chosen out-of-domain, best SPIN."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for seed in units[SHOWN]:
        sides = {
            "start": units["start"][seed]["scores"],
            BASELINE: units[BASELINE][seed]["best"]["out_of_domain"]["test"],
            SHOWN: units[SHOWN][seed]["scores"],
        }
        found[str(seed)] = {
            side: {name: round(scores[name], 1) for name in OPERATIONS} for side, scores in sides.items()
        }
    return found


def by_operation(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table of each seed's scores by operation."""
    lines = [f"| seed | {' | '.join(OPERATIONS)} |", f"|---|{'---|' * len(OPERATIONS)}"]
    for seed, sides in found.items():
        cells = (" → ".join(f"{scores[name]:.0f}" for scores in sides.values()) for name in OPERATIONS)
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves(units: Units, score: str) -> list[Curve]:
    """Return each method's score over its compute, as a share of SPIN's, from the start on; means over seeds."""
    total = {seed: unit["compute"] for seed, unit in units["spin"].items()}
    found = []
    for method, seeds in units.items():
        if method == "start":
            continue
        each = []
        for seed in seeds:
            begin = [(0.0, units["start"][seed]["scores"][score])]
            each.append(begin + [(p["compute"] / total[seed], p["scores"][score]) for p in seeds[seed]["curve"]])
        found.append(Curve(LABELS[method].replace("`", ""), method, each))
    return found


def outputs() -> dict[Path, str]:
    """Return the content of every file that is generated."""
    files: dict[Path, str] = {}
    blocks: dict[str, str] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for task in COLUMNS:
        units = read(task)
        if not {"start", "spin", BASELINE} <= units.keys():
            continue
        first_sweep, otherwise, units = units[BASELINE], chosen_otherwise(units), joined(units)
        methods = summary(task, units, first_sweep)
        fixed = fixed_elsewhere(units)
        numbers[task] = {"methods": methods, "chosen_otherwise": otherwise, "dev_of_fixed_settings": fixed}
        blocks[task] = table(task, methods)
        blocks[f"{task}-main"] = table(task, {method: methods[method] for method in MAIN if method in methods})
        blocks[f"{task}-seeds"] = by_seed(methods)
        if task == "tiny" and SHOWN in units:
            numbers[task]["operations"] = operations(units)
            blocks["tiny-operations"] = by_operation(numbers[task]["operations"])
        panels = {COLUMNS[task][score]: curves(units, score) for score in compared(units)}
        files[ROOT / f"docs/evidence-{task}.svg"] = figure(panels)
    files[SUMMARY] = json.dumps(numbers, indent=1) + "\n"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        files[page] = BLOCK.sub(
            lambda match: match[1] + blocks[match[2]] + match[3] if match[2] in blocks else match[0], text
        )
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for file, text in outputs().items():
        if check and (not file.exists() or file.read_text(encoding="utf-8") != text):
            sys.exit(f"{file.relative_to(ROOT)} is outdated: run python scripts/make_evidence.py")
        if not check:
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
