"""Units of evidence run by the real commands, once."""

import importlib
import json
import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from spin_plugin.versions import discovers_plugins

METHODS = ("start", "spin", "sft", "dpo", "sdft")
ROWS = 64


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts/tiny")])
    return importlib.import_module("evidence")


@pytest.fixture
def small(evidence: Any) -> type:
    """The tiny task with an untrained start, little data and short runs."""
    make, task, measure = (importlib.import_module(name) for name in ("make", "task", "trials.task"))

    class Small(evidence.Tiny):  # type: ignore[name-defined, misc]
        sweep = measure.Sweep(learning_rates=(1e-3,), epochs=(1,), checkpoints=2)
        dpo_sweep = measure.Sweep(learning_rates=(1e-3,), epochs=(1,), checkpoints=2)
        sdft_sweep = measure.Sweep(learning_rates=(1e-3,), checkpoints=2)
        sdft = ("--batch-size", "64", "--max-completion", "16")  # what it learns does not matter here

        @property
        def start(self) -> Path:
            made = self.directory / "made"
            if not made.exists():
                (made / "data").mkdir(parents=True)
                items = task.sample_heldout(2 * ROWS, random.Random(0))
                rows = [{"messages": make.messages(item)} for item in items[:ROWS]]
                make.write_jsonl(made / "data/sft.jsonl", rows)
                make.write_jsonl(made / "data/heldout.jsonl", (item._asdict() for item in items[ROWS:]))
                tokenizer = make.build_tokenizer()
                make.build_model(tokenizer).save_pretrained(made / "base")
                tokenizer.save_pretrained(made / "base")
            return made / "base"

        @property
        def spin(self) -> dict[str, Any]:
            config: dict[str, Any] = super().spin | {"num_epochs": 1}
            config["spin"]["iterations"] = 2
            return config

    return Small


@pytest.mark.slow
@pytest.mark.skipif(not discovers_plugins(), reason="written for Axolotl 0.21")
def test_units_run_once_and_stay_within_spins_compute(
    evidence: Any, small: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evidence.TASKS, "tiny", small)
    options = Namespace(task="tiny", methods=METHODS, out=tmp_path / "out", results=tmp_path / "results", inputs=None)
    evidence.chain(options, 1)
    files = {method: tmp_path / f"results/tiny-{method}-1.json" for method in METHODS}
    units = {method: json.loads(file.read_text()) for method, file in files.items()}
    budgets = [point["compute"] for point in units["spin"]["curve"]]
    assert len(budgets) == 2
    for method in ("sft", "dpo", "sdft"):
        costs = [candidate["compute"] for candidate in units[method]["candidates"]]
        assert costs[0] == 0  # the start
        assert len(costs) > 1
        assert max(costs) <= budgets[-1]
    assert all(len(unit["questions"]["in_domain"]) == ROWS for unit in units.values())
    before = [file.stat().st_mtime_ns for file in files.values()]
    evidence.chain(options, 1)
    assert [file.stat().st_mtime_ns for file in files.values()] == before
    assert not list((tmp_path / "out").rglob("sft/**/*.safetensors"))

    # the start of the results is not the one that this machine makes
    files["start"].write_text(json.dumps(units["start"] | {"dev": {"in_domain": 12.5}}))
    files["sft"].unlink()
    with pytest.raises(SystemExit, match="seed 1, was made again and has other scores"):
        evidence.chain(options, 1)
