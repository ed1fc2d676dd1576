"""What torch makes of our attention for GPUs, looked at on a CPU: a kernel is found, it fits the card, and it is right.

On torch's build for CPUs and with private names of torch 2.13 and Triton 3.9, so with no others.
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

pytestmark = pytest.mark.oldest  # it has the torch that they are read for
known = pytest.mark.skipif(
    not torch.__version__.startswith("2.13.") or not triton.__version__.startswith("3.9."),
    reason=f"reads torch 2.13 and Triton 3.9, and these are {torch.__version__} and {triton.__version__}",
)

SHORT, LONGER = [40, 30, 14], [200, 50, 50]
TWO_PAIRS = [[300, 60, 60], [30, 30, 20]]


def alone(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script prints in a process of its own, a line of JSON each."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def played(mode: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = alone("kernels_without_gpu.py", mode, json.dumps(cases))
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
def test_blocks_are_smaller_where_torchs_do_not_fit(
    size: int, dtype: torch.dtype, shared_memory: int | None, small: bool
) -> None:
    options = kernel_options(size, dtype, None if shared_memory is None else shared_memory * 1024)
    assert options.pop("BACKEND") == "TRITON"
    assert set(options.values()) == ({32} if small else set())


# Below 128 tokens torch would take another kernel, which exists for some numbers of heads alone.
LOWERED: list[dict[str, Any]] = [
    {"rows": [[[8, 6, 6]]], "heads": (16, 2), "card": 80, "size": 64, "window": 7},
    {"rows": [[SHORT]], "heads": (32, 8), "card": 90, "size": 128},
    {"rows": [[SHORT]], "heads": (16, 2), "card": 89, "size": 80, "gradients": False},
    {"rows": [[SHORT]], "heads": (12, 2), "card": 100, "size": 256, "softcap": 50.0, "gradients": False},
    {"rows": [[[30, 69, 1]]], "heads": (32, 8), "card": 120, "size": 96, "gradients": False},
    {"rows": [[SHORT]], "heads": (32, 32), "card": 86, "size": 64, "softcap": 30.0, "window": 20},
    {"rows": [[LONGER], [[2000, 1500, 1500]]], "heads": (16, 2), "card": 90, "size": 256, "softcap": 50.0},
]


@known
@pytest.mark.slow
def test_a_kernel_is_found_for_every_row() -> None:
    """And once for all rows of several blocks, whatever their length."""
    for case, result in zip(LOWERED, played("lower", LOWERED), strict=True):
        backward = ["flex_attention_backward" in kernel["name"] for kernel in result["kernels"]]
        assert backward == ([False, True] if case.get("gradients", True) else [False])


@known
@pytest.mark.slow
def test_kernels_fit_the_card() -> None:
    limits = {86: 99, 90: 227, 120: 99}
    cases = [{"card": card, "size": size, "rows": [TWO_PAIRS]} for card, size in ((90, 128), (86, 256), (120, 256))]
    for case, result in zip(cases, played("compile", cases), strict=True):
        assert len(result["kernels"]) == 2
        assert all(kernel["shared"] <= limits[case["card"]] * 1024 for kernel in result["kernels"]), result


def largest(result: dict[str, Any]) -> float:
    return max(error for row in result["errors"] for error in row.values())


@known
@pytest.mark.slow
def test_kernels_give_the_references_values_and_gradients() -> None:
    """By the largest value, bf16's rounding is 0.8% at most; one block wrongly called full shows by ten times that."""
    cases: list[dict[str, Any]] = [
        {"rows": [TWO_PAIRS, [[150, 60, 60], [280, 70, 20]]], "size": 64, "heads": [2, 1]},
        {"rows": [TWO_PAIRS], "size": 64, "heads": [2, 2], "window": 50, "softcap": 2.0},
        {"rows": [[SHORT]], "size": 128, "heads": [4, 1]},
        {"rows": [[[60, 70, 30]]], "size": 256, "heads": [1, 1], "card": 86},
        {"rows": [TWO_PAIRS], "size": 64, "heads": [2, 1], "wrong": True},
    ]
    *right, wrong = played("run", [{"card": 90} | case for case in cases])
    assert [len(result["errors"]) for result in right] == [2, 1, 1, 1]
    assert all(largest(result) < 0.015 for result in right), right
    assert largest(wrong) > 0.1, wrong


def test_a_forward_neither_mixes_devices_nor_waits() -> None:
    assert len(alone("forward_without_gpu.py")) == 3 * 3  # models; forward of both forms, backward of the flat one
