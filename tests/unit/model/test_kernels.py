"""The attention's GPU kernels, checked on a CPU: torch finds one, it fits the GPU, and its results are right.

These tests use private names of torch 2.13 and Triton 3.9 and are skipped with other versions.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
from conftest import ROOT

from spin_plugin.model.flex import kernel_options

pytestmark = pytest.mark.oldest  # the oldest environment has the matching torch
needs_known_versions = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or not triton.__version__.startswith("3.9."),
    reason=f"needs torch 2.13 and Triton 3.9, not {torch.__version__} and {triton.__version__}",
)

SHORT, LONGER = [40, 30, 14], [200, 50, 50]
TWO_PAIRS = [[300, 60, 60], [30, 30, 20, 40]]  # the second prompt has two synthetic responses


def run_script(script: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a script in its own process and return the JSON lines it prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_cases(mode: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = run_script("kernels_without_gpu.py", mode, json.dumps(cases))
    assert len(results) == len(cases)
    failed = [(case, result["failed"]) for case, result in zip(cases, results, strict=True) if "failed" in result]
    assert not failed, failed
    return results


@pytest.mark.parametrize(
    ("size", "dtype", "shared_memory", "small"),
    [
        (256, torch.bfloat16, 99, True),
        (192, torch.float16, 99, True),
        (128, torch.bfloat16, 99, False),
        (512, torch.bfloat16, 99, False),
        (256, torch.float32, 99, False),
        (256, torch.bfloat16, 163, False),
        (256, torch.float16, 64, False),
        (256, torch.bfloat16, None, False),
    ],
)
def test_blocks_are_smaller_if_torchs_do_not_fit(
    size: int, dtype: torch.dtype, shared_memory: int | None, small: bool
) -> None:
    options = kernel_options(size, dtype, None if shared_memory is None else shared_memory * 1024)
    assert options.pop("BACKEND") == "TRITON"
    assert set(options.values()) == ({32} if small else set())


# Below 128 tokens, torch would by default choose a kernel that only supports some numbers of heads.
LOWERED: list[dict[str, Any]] = [
    {"rows": [[[8, 6, 6]]], "heads": (16, 2), "card": 80, "size": 64, "window": 7},
    {"rows": [[SHORT]], "heads": (32, 8), "card": 90, "size": 128},
    {"rows": [[SHORT]], "heads": (16, 2), "card": 89, "size": 80, "gradients": False},
    {"rows": [[SHORT]], "heads": (12, 2), "card": 100, "size": 256, "softcap": 50.0, "gradients": False},
    {"rows": [[[30, 69, 1]]], "heads": (32, 8), "card": 120, "size": 96, "gradients": False},
    {"rows": [[SHORT]], "heads": (32, 32), "card": 86, "size": 64, "softcap": 30.0, "window": 20},
    {"rows": [[LONGER], [[2000, 1500, 1500]]], "heads": (16, 2), "card": 90, "size": 256, "softcap": 50.0},
]


@needs_known_versions
@pytest.mark.slow
def test_a_kernel_is_found_for_every_row() -> None:
    """Rows of several blocks share one kernel, whatever their length."""
    for case, result in zip(LOWERED, run_cases("lower", LOWERED), strict=True):
        backward = ["flex_attention_backward" in kernel["name"] for kernel in result["kernels"]]
        assert backward == ([False, True] if case.get("gradients", True) else [False])


@needs_known_versions
@pytest.mark.slow
def test_kernels_fit_in_shared_memory() -> None:
    limits = {86: 99, 90: 227, 120: 99}
    cases = [{"card": card, "size": size, "rows": [TWO_PAIRS]} for card, size in ((90, 128), (86, 256), (120, 256))]
    for case, result in zip(cases, run_cases("compile", cases), strict=True):
        assert len(result["kernels"]) == 2
        assert all(kernel["shared"] <= limits[case["card"]] * 1024 for kernel in result["kernels"]), result


def largest(result: dict[str, Any]) -> float:
    return max(error for row in result["errors"] for error in row.values())


@needs_known_versions
@pytest.mark.slow
def test_kernels_match_the_references_values_and_gradients() -> None:
    """bf16 rounding is at most 0.8% of the largest value; marking one partial block as full exceeds ten times that."""
    cases: list[dict[str, Any]] = [
        {"rows": [TWO_PAIRS, [[150, 60, 60], [280, 70, 20]]], "size": 64, "heads": [2, 1]},
        {"rows": [TWO_PAIRS], "size": 64, "heads": [2, 2], "window": 50, "softcap": 2.0},
        {"rows": [[SHORT]], "size": 128, "heads": [4, 1]},
        {"rows": [[[60, 70, 30]]], "size": 256, "heads": [1, 1], "card": 86},
        {"rows": [TWO_PAIRS], "size": 64, "heads": [2, 1], "corrupt_mask": True},
    ]
    *right, wrong = run_cases("run", [{"card": 90} | case for case in cases])
    assert [len(result["errors"]) for result in right] == [2, 1, 1, 1]
    assert all(largest(result) < 0.015 for result in right), right
    assert largest(wrong) > 0.1, wrong


def test_step_neither_mixes_devices_nor_synchronizes() -> None:
    # three models; forward in both layouts, backward in the shared-prefix one
    assert len(run_script("forward_without_gpu.py")) == 3 * 3
