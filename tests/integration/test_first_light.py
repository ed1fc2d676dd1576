"""first_light.py runs on a CPU with only torch and transformers, and detects faults."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Finished

GPU = ROOT / "scripts/gpu"
# Makes Python behave as if these packages were not installed.
WITHOUT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = {"axolotl", "datasets", "accelerate", "peft", "trl", "vllm", "deepspeed", "torchao", "bitsandbytes", "dill"}
def find_spec(name, *args):
    return None if name.partition(".")[0] in absent else find(name, *args)
PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    for directory in (GPU, ROOT / "scripts/bench"):
        monkeypatch.syspath_prepend(directory)
    return importlib.import_module("first_light")


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """Environment variables that hide everything but torch and transformers."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    return {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_all_checks_pass_with_only_torch_and_transformers(
    command: Callable[..., Finished], alone: dict[str, str], tmp_path: Path
) -> None:
    missing = command(sys.executable, "-c", "import accelerate", directory=tmp_path, environment=alone)
    assert "No module named 'accelerate'" in missing.output
    rows = tmp_path / "rows.json"
    options = ("--device", "cpu", "--quick", "--json", rows)
    done = command(sys.executable, GPU / "first_light.py", *options, directory=tmp_path, environment=alone)
    assert done.code == 0, done.output[-3000:]
    verdicts = {(row["check"], row["case"]): row["verdict"] for row in json.loads(rows.read_text())}
    assert {check for check, _ in verdicts} == {
        "machine", "attention", "head", "checkpointing", "compilations", "waits", "shapes", "weights", "kernels",
        "steps",
    }  # fmt: skip
    assert len(verdicts) == 50
    assert verdicts.pop(("waits", "forward, loss, metrics, backward")) == "left out"
    assert set(verdicts.values()) == {"ok"}


def attention_verdict(light: Any, layer: Any, tokens: int) -> str:
    case, run = f"{layer}", lambda: light.core.attention_row(layer, tokens, light.Setting("cpu", quick=True))
    light.CHECKS["one"] = lambda _setting: iter([(case, run)])
    (row,) = light.run_check("one", light.Setting("cpu", quick=True))
    return row.verdict


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", ["window", "neighbor", "scaling"])
def test_broken_attention_is_wrong(light: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, fault: str) -> None:
    """A window one key too large, a synthetic response that sees a real token, a slightly wrong scale."""
    attend, layer = light.core.attend, light.core.Layer(dtype, 64)
    assert attention_verdict(light, layer, 84) == "ok"

    def broken(*states: Any, spans: Any, sliding_window: int | None, softcap: float | None) -> Any:
        if fault == "window" and sliding_window:
            sliding_window += 1
        if fault == "neighbor":
            first = (spans.spans[:, 0] + spans.spans[:, 1] == spans.spans[:, 2])[:, None]
            late = torch.where(first, torch.tensor([0, 1, 1, -1]), torch.tensor([0, 1, 0, 0]))
            wrong = spans.spans + late  # the prompt ends one token late
            spans = light.core.SharedPrefix(wrong, spans.tokens)
        scaling = 0.14 if fault == "scaling" else None
        return attend(*states, spans=spans, sliding_window=sliding_window, softcap=softcap, scaling=scaling)

    monkeypatch.setattr(light.core, "attend", broken)
    assert attention_verdict(light, layer, 84) == "WRONG"


def test_case_that_raises_is_wrong_and_the_next_one_runs(light: Any) -> None:
    def raises() -> Any:
        raise RuntimeError("no kernel\nand much more")

    light.CHECKS["two"] = lambda _setting: iter([("first", raises), ("second", lambda: light.Found(True, {}))])
    first, second = light.run_check("two", light.Setting("cpu", quick=True))
    assert (first.verdict, first.numbers) == ("WRONG", {"error": "RuntimeError: no kernel"})
    assert second.verdict == "ok"


def test_check_whose_process_crashes_is_wrong(light: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a segmentation fault; earlier rows stay in the table."""
    fork = light.multiprocessing.get_context("fork")  # avoids reimporting everything
    monkeypatch.setattr(light.multiprocessing, "get_context", lambda _method: fork)
    monkeypatch.setattr(light, "send_rows", send_one_and_exit)
    first, last = light.rows_of("head", light.Setting("cpu", quick=True))
    assert (first, last.verdict) == ("a row", "WRONG")
    assert last.numbers == {"error": "its process exited with code 9"}


def send_one_and_exit(_check: str, _setting: Any, sender: Any) -> None:
    sender.send("a row")
    os._exit(9)


def test_compilations_are_counted(light: Any) -> None:
    before = light.training.graphs()
    double = torch.compile(lambda tensor: tensor * 2, backend="eager", dynamic=False)
    for size in (3, 4, 3):
        double(torch.ones(size))
    assert light.training.graphs() - before == 2
    torch.compiler.reset()


def test_side_that_does_not_fit_works_in_smaller_micro_batches(light: Any) -> None:
    tried = []

    def measure(micro_batch: int) -> dict[str, int]:
        tried.append(micro_batch)
        if micro_batch > 8:
            raise torch.OutOfMemoryError
        return {"micro_batch": micro_batch}

    assert light.speed.bench.halve_until_it_fits(measure, 32) == {"micro_batch": 8}
    assert tried == [32, 16, 8]


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA T4", None)],
)
def test_peak_flops_by_gpu_name(light: Any, name: str, tera: int | None) -> None:
    found = light.speed.bench.peak_flops(name)
    assert found == (tera and tera * 1e12)


def test_missing_gpu_is_reported(
    light: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["first_light.py"])
    with pytest.raises(SystemExit) as ended:
        light.main()
    assert ended.value.code == 2
    assert "torch sees no GPU; use `--device cpu --quick` to test the program without one" in capsys.readouterr().err
