"""Questions to SQL with a small language model: what one iteration of SPIN does to execution accuracy.

    python scripts/bench/sql.py --data DIR --base MODEL --out DIR [--settings plain sft_weight] [--seeds 3]

`--data` holds train.jsonl, test.jsonl (chat rows) and geography.sqlite; `--base` is a chat model. First the start:
three epochs of SFT at 5e-5. Then, for each setting and seed, one iteration through `axolotl train`. Every model answers
the test questions greedily and with four samples at temperature 1; an answer is right if it returns the rows of the
reference. Writes one JSON file per model into `--results`; finished ones are skipped, so it can be interrupted.
`--bf16` makes SPIN train and generate in bf16. Several programs with other settings can share one GPU: then make the
start first (`--seeds 0`), and give each `--gpu-share`.
"""

import argparse
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer
from trials.chat_task import COMMON, END
from trials.unit import ROOT, run

from spin_plugin.judge import sqlite
from spin_plugin.run.directory import RunDir

# Overrides of the SPIN configuration. `plain` is the paper's loss at a fifth of SFT's learning rate.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 1e-5},
    "low": {"learning_rate": 1e-6},
    "space": {"learning_rate": 1e-5, "spin": {"loss_type": "space"}},
    "sft_weight": {"learning_rate": 1e-5, "spin": {"sft_weight": 5.0}},
    "space_sft": {"learning_rate": 1e-5, "spin": {"loss_type": "space", "sft_weight": 5.0}},
    "real_penalty": {"learning_rate": 1e-5, "spin": {"real_penalty": 5.0}},
    "judge": {"learning_rate": 1e-5, "spin": {"judge": True}},
    "judge_sft": {"learning_rate": 1e-5, "spin": {"judge": True, "sft_weight": 5.0}},
}
KV_CACHE = 4 << 30  # bytes; fixed, because vLLM cannot measure its memory beside others on the GPU


def configuration(options: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Return what SFT and SPIN have in common."""
    return COMMON | {
        "base_model": str(options.base),
        "output_dir": str(output_dir),
        "datasets": [{"path": str(options.data / "train.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "bf16": options.bf16,
    }


def train(directory: Path, config: dict[str, Any]) -> None:
    """Run `axolotl train` on a configuration written to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run(["axolotl", "train", directory / "config.yml"], directory / "log")


def sft(options: argparse.Namespace) -> Path:
    """Return the directory of the start, trained if it is missing."""
    model = options.out / "sft"
    if not (options.out / "sft-finished").exists():
        # in fp32: Axolotl's SFT with `bf16: true` trains bf16 weights, which 103 steps at this rate hardly move
        own = {"num_epochs": 3, "learning_rate": 5e-5, "bf16": False}
        train(options.out / "sft-run", configuration(options, model) | own)
        (options.out / "sft-finished").touch()
    return model


def spin(options: argparse.Namespace, start: Path, setting: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Return the model of one iteration, trained if it is missing, and the entry of the iteration in run.json."""
    directory = options.out / f"{setting}-{seed}"
    overrides = SETTINGS[setting]
    config = configuration(options, directory / "run") | {
        "rl": "spin",
        "base_model": str(start),
        "num_epochs": 2,
        "seed": seed,
        **overrides,
    }
    config["spin"] = {"iterations": 1, "beta": 0.3} | overrides.get("spin", {})
    if options.gpu_share:
        config["vllm"] = {"gpu_memory_utilization": options.gpu_share, "enforce_eager": True}
        config["spin"]["generation"] = {"vllm_kwargs": {"kv_cache_memory_bytes": KV_CACHE}}
    if config["spin"].get("judge"):
        database = str(options.data / "geography.sqlite")
        config["spin"]["judge"] = {"function": "sqlite", "kwargs": {"database": database}}
    found = RunDir(directory / "run")
    if not found.finished():
        train(directory, config)
    state = found.read_state()
    assert state is not None
    return found.iteration(0).path, state.finished[0]


def accuracy(options: argparse.Namespace, model: Path, name: str) -> dict[str, Any]:
    """Answer the test questions; returns the share of right answers in percent and the answers' scores."""
    rows = [json.loads(line)["messages"] for line in (options.data / "test.jsonl").open(encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False, tokenize=True)
        for row in rows
    ]
    asked, answered = options.out / f"prompts-{name}.json", options.out / f"answers-{name}.json"
    asked.write_text(json.dumps(prompts), encoding="utf-8")
    script = [options.vllm_python, ROOT / "scripts/bench/answers.py", model, asked, answered]
    end = tokenizer.convert_tokens_to_ids(END)
    script += ["--samples", str(options.samples), "--stop", str(end)]
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    script += ["--dtype", dtype, "--gpu-share", str(options.gpu_share or 0.5)]
    run(script, options.out / f"answers-{name}.log")
    scores = []
    for row, answers in zip(rows, json.loads(answered.read_text(encoding="utf-8")), strict=True):
        texts = [tokenizer.decode(answer) for answer in answers]
        real = [row[-1]["content"]] * len(texts)
        scores.append(sqlite([], real, texts, database=str(options.data / "geography.sqlite")))
    return {
        "greedy": 100 * statistics.mean(score[0] for score in scores),
        "sampled": 100 * statistics.mean(statistics.mean(score[1:]) for score in scores),
        "scores": scores,
    }


def write(options: argparse.Namespace, name: str, model: Path, **entry: Any) -> None:
    """Evaluate a model and write its JSON file, unless that exists."""
    file = options.results / f"sql-{name}.json"
    if not file.exists():
        entry |= accuracy(options, model, name)
        entry["versions"] = {package: version(package) for package in ("axolotl", "torch", "transformers")}
        entry["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        entry["bf16"] = options.bf16
        file.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    sys.stdout.write(f"{name}: greedy {found['greedy']:.1f}, sampled {found['sampled']:.1f}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=ROOT / "scripts/bench/results")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["plain", "sft_weight"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gpu-share", type=float, help="vLLM's share of the GPU's memory")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    options = parser.parse_args()
    for name in ("data", "base", "out", "results", "vllm_python"):
        setattr(options, name, getattr(options, name).absolute())
    options.out.mkdir(parents=True, exist_ok=True)
    start = sft(options)
    write(options, "start", start)
    for seed in range(options.seeds):
        for setting in options.settings:
            name = f"{setting}-{seed}"
            if not (options.results / f"sql-{name}.json").exists():
                model, entry = spin(options, start, setting, seed)
                write(options, name, model, setting=SETTINGS[setting], seed=seed, iteration=entry)


if __name__ == "__main__":
    main()
