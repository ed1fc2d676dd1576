"""gpu_check.sh: valid configurations, requirements, what is left out, and the verdicts on finished runs."""

import importlib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import GPU, ROOT, Finished
from torch.nn.functional import softplus

from spin_plugin.config.lower import lower
from spin_plugin.opponent.agreement import Distance, require_agreement


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    for directory in (ROOT / "scripts", ROOT / "scripts/gpu"):
        monkeypatch.syspath_prepend(directory)
    return importlib.import_module("check")


def test_every_configuration_is_valid(
    check: Any, registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large model is replaced by the tiny one."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    gpu_configs = importlib.import_module("gpu_configs")
    monkeypatch.setitem(gpu_configs.MODELS, "1b", gpu_configs.MODELS["tiny"])
    monkeypatch.setattr("sys.argv", ["gpu_configs.py", str(tmp_path)])
    gpu_configs.main()
    assert {path.stem for path in tmp_path.glob("*.yml")} == set(gpu_configs.WAYS)
    assert len(gpu_configs.WAYS) > 25
    for way in gpu_configs.WAYS:
        cfg = DictDefault(yaml.safe_load((tmp_path / f"{way}.yml").read_text()))
        lower(cfg, AxolotlInputConfig.model_fields)
        validate_config(cfg, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})


def test_changes_of_a_way_reach_its_configuration(check: Any, tmp_path: Path) -> None:
    configs = {way: check.config_of(tmp_path, way) for way in check.WAYS}
    assert configs["beta-5"]["spin"]["beta"] == 5.0
    assert configs["one"]["spin"]["generation"] == {"max_tokens": 12}
    assert configs["tensor"]["vllm"] == {"tensor_parallel_size": 2}
    assert configs["share"]["vllm"] == {"gpu_memory_utilization": 0.95}
    assert configs["ray"]["spin"]["generation"]["backend"] == "ray"
    assert configs["ddp"]["micro_batch_size"] == 16
    assert configs["soft-capped"]["base_model"] == str(tmp_path / "soft-capped")
    real = configs["real-size"]
    assert (real["sequence_len"], real["micro_batch_size"], real["gradient_checkpointing"]) == (1024, 8, True)
    assert real["spin"]["generation"] == {}  # max_tokens is left to the default
    # unset, so that the plugin turns the kernels off
    assert [configs[way].get("lora_mlp_kernel") for way in ("lora", "lora-kernels")] == [None, True]


def test_long_conversations_fit_the_sequence_length(check: Any) -> None:
    rows = importlib.import_module("gpu_configs").long_rows(96)
    sizes = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    assert 700 < min(sizes) <= max(sizes) < 1024 - 40  # what chatml adds


def test_without_a_gpu_one_line_states_the_requirements(command: Callable[..., Finished], tmp_path: Path) -> None:
    """nvidia-smi is replaced by one that fails, as without a driver."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = command(ROOT / "scripts/gpu_check.sh", directory=ROOT, environment={"PATH": path})
    assert done.code == 1
    assert done.output == (
        "gpu_check: nvidia-smi shows no GPU; run this on a machine with an NVIDIA GPU (all checks need two)\n"
    )


def test_one_gpu_leaves_out_ways_with_several_processes(check: Any) -> None:
    assert not check.left_out(2)
    left_out = check.left_out(1)
    assert {"ddp", "fsdp2", "zero3", "two-engines", "tensor", "ray"} <= set(left_out)
    assert all(way.processes == 1 for name, way in check.WAYS.items() if name not in left_out)
    assert {"one", "qlora", "grouped", "soft-capped", "real-size"} <= set(check.WAYS) - set(left_out)


def test_table_lists_only_what_is_left_out_if_nothing_can_run(check: Any, tmp_path: Path) -> None:
    options = check.argparse.Namespace(gpus=1, only=["ddp", "ray"], directory=tmp_path)
    heading, (line, right) = check.table(options)
    assert heading[1]
    assert right
    assert line == "left out because this machine has 1 GPU(s): ddp (2 GPUs), ray (2 GPUs)"


@pytest.mark.parametrize(("beta", "pairs"), [(0.1, 32), (0.1, 8), (5.0, 32), (5.0, 8)])
def test_tolerance_matches_the_rounding_error_of_the_loss(check: Any, beta: float, pairs: int) -> None:
    """Over many samples of the noise: nearly all are within the tolerance, which is not far above the largest."""
    generator = torch.Generator().manual_seed(0)
    margins = beta * check.MARGIN_NOISE * torch.randn(4000, pairs, generator=generator)
    off = (softplus(-margins).mean(1) - math.log(2)).abs()
    allowed = check.first_loss_tolerance(beta, pairs)
    assert (off <= allowed).float().mean() > 0.99
    assert allowed < 2 * off.quantile(0.99)


def test_distance_is_read_from_the_log_of_the_run(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for iteration, mean in enumerate((3e-7, 0.02)):
        found = Distance(mean=mean, largest=0.3, kl=1e-4, tokens=900, responses=60)
        require_agreement(found, iteration, exact=False, quantized=False)
    assert check.apart_in(f"something\n{capsys.readouterr().out}") == 0.02
    assert check.apart_in("no word of it") is None
    assert math.isnan(check.apart_in("vLLM and the policy are nan nats per token apart"))


AGREED = "spin: iteration 1: vLLM and the policy are 0.002 nats per token apart in the responses\n"


@pytest.mark.parametrize(
    ("code", "log", "losses", "beta", "wrong"),
    [
        (0, AGREED, [0.6931, 0.5], 0.1, None),
        (0, AGREED, [0.700, 0.5], 0.1, None),
        (0, AGREED, [0.73, 0.5], 0.1, "the first loss is not ln 2"),
        (0, AGREED, [float("nan")], 0.1, "the first loss is not ln 2"),
        (0, AGREED, [1.5, 0.5], 5.0, None),
        (0, AGREED, [5.5, 0.5], 5.0, "the first loss is not ln 2"),
        (0, AGREED, [], 0.1, "no loss was logged"),
        (0, "", [0.6931], 0.1, "vLLM and the policy were not compared"),
        (1, "…\nspin: error: no room\n", [], 0.1, "no room"),
        (1, "Traceback", [0.6931], 0.1, "see one.log"),
    ],
)
def test_verdict(check: Any, code: int, log: str, losses: list[float], beta: float, wrong: str | None) -> None:
    row = check.evaluate("one", code, log, losses, beta)
    assert row.wrong == wrong
    assert re.search(r"\bWRONG\b" if wrong else r"\bok\b", str(row))


@pytest.mark.parametrize(("rate", "right"), [(0.96, True), (0.94, False)])
def test_generation_slower_than_bare_vllm_is_wrong(check: Any, rate: float, right: bool) -> None:
    line, fine = check.evaluate_speed({"vs_bare": rate, "unseeded_vs_bare": 1.02})
    assert fine is right
    assert line.endswith(f": ours / bare {rate:.3f}, bare without seeds / bare 1.020")
