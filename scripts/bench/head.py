"""Our chunked LM head against torch's `linear_cross_entropy(reduction="none")`: time, memory, error against fp64.

    python scripts/bench/head.py [--rows 2048] [--hidden 576] [--vocabulary 49152] [--json FILE]

Both work on 1,024 rows at a time and take the gradient of a weighted sum of log-probs, as a pair loss does. Needs
torch 2.13 or newer.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spin_plugin.model.head import CHUNK, KEPT, LogitMap, _LinearLogps

RUNS = 3


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _LinearLogps.apply(hidden, weight, None, targets, LogitMap(), KEPT)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.mT).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "torch": torchs}


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, dtype: torch.dtype, rows: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Seconds of forward and backward, peak bytes, and errors of one head."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    states = torch.randn(rows, hidden, dtype=dtype, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, dtype=dtype, device=device) * 0.05).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    direction = torch.randn(rows, device=device)

    def gradients(head: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        logps = head(*leaves, targets)
        return logps.detach(), *torch.autograd.grad((logps.double() * direction).sum(), leaves)

    seconds, before = [], peak()
    for _ in range(RUNS):
        start = time.perf_counter()
        found = gradients(HEADS[name], states, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = peak() - before
    expected = gradients(exact, states.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    relative = [
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, expected, strict=True)
    ]
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_bytes": memory,
        "logp_error_max": (found[0].double() - expected[0]).abs().max().item(),
        "hidden_gradient_error": relative[1],
        "weight_gradient_error": relative[2],
    }


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """Measure in a fork of its own, because a process's peak of memory never falls."""
    read, write = os.pipe()
    if not os.fork():
        os.write(write, json.dumps(measure(*arguments)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as result:
        return json.load(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "shape": [options.rows, options.hidden, options.vocabulary]}
    for dtype in (torch.float32, torch.bfloat16):
        shape = (options.rows, options.hidden, options.vocabulary)
        heads = {name: in_a_process(name, dtype, *shape) for name in HEADS}
        ratios = {
            f"torch_vs_ours_{what}": heads["torch"][what] / heads["ours"][what]
            for what in ("median_seconds", "peak_bytes")
        }
        result[str(dtype).removeprefix("torch.")] = heads | ratios
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
