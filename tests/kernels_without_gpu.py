"""Check the GPU kernels of the attention on a machine without a GPU.

    python tests/kernels_without_gpu.py MODE CASES

MODE is one of
    lower    lower for CUDA and list the kernels found: forward and, with gradients, backward
    compile  also compile the generated Triton kernels for the GPU and report their shared memory
    run      run the kernels in Triton's interpreter and compare output and gradients with `dense_attention`
CASES is a JSON list of `Case`s. Prints one line of JSON per case: {"kernels": …}, {"errors": …} or {"failed": …}.

Run it in its own process, because it patches torch. Dynamo and autograd work on CPU tensors, because autograd queries
the driver for CUDA tensors. Their graphs are retagged as CUDA before Inductor runs, under a simulated GPU.
"""

import contextlib
import inspect
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

MODE = sys.argv[1] if __name__ == "__main__" else ""
os.environ["TRITON_INTERPRET"] = str(int(MODE == "run"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo.device_interface  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._higher_order_ops.flex_attention  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch.utils._triton  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor import compile_fx  # noqa: E402
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers, triton_heuristics  # noqa: E402
from torch._subclasses import FakeTensor  # noqa: E402
from torch.nn.attention import flex_attention as torch_flex  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from spin_plugin.model import attention, flex  # noqa: E402
from spin_plugin.model.layout import row_spans  # noqa: E402

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Limit per block in KB, by compute capability."""
GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Case:
    """Consecutive rows of one model on one GPU, as in training."""

    card: int
    """Compute capability."""
    rows: list[list[list[int]]]
    """[prompt, real, synthetic] lengths of every pair of every row."""
    heads: tuple[int, int] = (32, 8)
    size: int = 128
    window: int | None = None
    softcap: float | None = None
    gradients: bool = True
    dtype: str = "bfloat16"
    corrupt_mask: bool = False
    """Mark one partial block as full, which the errors must show."""


# --- the simulated GPU -----------------------------------------------------------------------------


@contextlib.contextmanager
def simulated_gpu(capability: int) -> Iterator[None]:
    """Make torch.cuda and Triton see a GPU of this compute capability."""
    limit, version = SHARED_MEMORY[capability] * 1024, divmod(capability, 10)
    properties = SimpleNamespace(
        name="simulated",
        major=version[0],
        minor=version[1],
        multi_processor_count=108,
        regs_per_multiprocessor=65536,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        total_memory=80 << 30,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=limit,
        L2_cache_size=40 << 20,
    )
    limits = {"max_shared_mem": limit, "multiprocessor_count": 108, "max_num_regs": 65536, "warpSize": 32}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_active_torch_device=lambda: GPU,
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        utils=SimpleNamespace(get_device_properties=lambda _: limits),
    )
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: version,
        "get_rng_state": lambda *_: torch.zeros(1),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    interface: dict[str, Any] = {
        "get_device_properties": staticmethod(lambda *_: properties),
        "current_device": staticmethod(lambda: 0),
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(CudaInterface, **interface),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", interface["get_device_properties"]),
    ):
        triton.runtime.driver.set_active(driver)
        for cached in vars(torch.utils._triton).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        yield


def rewrite(module: Any, name: str, old: str, new: str) -> None:
    """Recompile a torch function from its source with `old` replaced by `new`."""
    source = inspect.getsource(getattr(module, name))
    assert old in source, f"{module.__name__}.{name}: no {old!r} in this version of torch"
    file = f"{SCRATCH}/{name}.py"
    with open(file, "w", encoding="utf-8") as copy:  # for inspect
        copy.write(source.replace(old, new))
    exec(compile(source.replace(old, new), file, "exec"), module.__dict__)


def patch_torch() -> None:
    """Apply the patches that last for the entire process."""
    torch.version.cuda = torch.version.cuda or "13.0"
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.use_static_triton_launcher = False
    triton_helpers.set_driver_to_gpu = lambda: None
    torch_flex._validate_device = lambda *_: None  # allow gradients on CPU tensors
    rewrite(torch_flex, "_apply_kernel_options", '.type == "cpu"', '.type == "none"')  # use CUDA's options
    # A CPU build of torch cannot copy fake CUDA tensors.
    operator = sys.modules["torch._higher_order_ops.flex_attention"]  # as an attribute, this name is the operator
    rewrite(operator, "_permute_strides", "new_out.copy_(out)", "out.is_cuda or new_out.copy_(out)")


# --- from graph to kernels -------------------------------------------------------------------------


def on_gpu(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        value.fake_device = GPU
    return value


def backend(case: Case, finish: Callable[[GraphLowering], Callable[..., Any]]) -> Callable[..., Any]:
    """Return a backend that runs Inductor on a simulated GPU; `finish` turns the lowered graph into a callable."""

    def inner(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        for node in (node for part in parts for node in part.graph.nodes):
            torch.utils._pytree.tree_map(on_gpu, node.meta.get("val"))
            if node.kwargs.get("device"):
                node.kwargs = {**node.kwargs, "device": GPU}

        def module(graph: GraphLowering) -> SimpleNamespace:
            return SimpleNamespace(__file__=os.devnull, key="", call=finish(graph))

        with simulated_gpu(case.card), mock.patch.object(GraphLowering, "compile_to_module", module):
            return compile_fx.compile_fx_inner(graph, [on_gpu(value) for value in inputs], **options)

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner)


class StoppedError(Exception):
    """Forward and backward are lowered; there is nothing to execute."""


def stop(*_: Any) -> None:
    raise StoppedError


def templates(source: str) -> list[tuple[str, str]]:
    """Return the names and sources of the attention kernels in the generated program."""
    found = re.findall(r"async_compile\.triton\('(\w+_tem_\w+)', '''(.*?)''', device_str", source, re.DOTALL)
    assert found, "no kernels in the generated program: this version of Inductor has another format"
    return found


def compiled(source: str, capability: int) -> list[dict[str, Any]]:
    """Compile the kernels of the generated program like Inductor's runtime and return their shared memory."""
    kernels = []
    for name, body in templates(source):
        with simulated_gpu(capability):
            tuner = getattr(PyCodeCache.load(body), name)
            (config,) = tuner.configs
            shared = tuner._precompile_config(config).kernel.metadata.shared
            if shared > SHARED_MEMORY[capability] * 1024 and config.num_stages > 1:
                config.num_stages = 1  # like Inductor's `compile_by_disabling_pipelining`
                shared = tuner._precompile_config(config).kernel.metadata.shared
        kernels.append({"name": name, "shared": shared, "stages": config.num_stages})
    return kernels


class Launch:
    """Replacement for Inductor's autotuner: runs the interpreted kernel over the generated program's grid."""

    def __init__(self, function: Any, grid: str, blocks: dict[str, int]) -> None:
        self.function, self.grid, self.blocks = function, grid, blocks

    def run(self, *arguments: Any, stream: Any = None) -> None:
        if self.grid == "FixedGrid":
            self.function[arguments[-3:]](*arguments[:-3])
        else:
            numbers = arguments[list(inspect.signature(self.function.fn).parameters).index("xnumel")]
            self.function[(triton.cdiv(numbers, 64), 1, 1)](*arguments, **self.blocks)


TANH = "\n@triton.jit\ndef tanh_(x):\n    return 2 * tl.sigmoid(2 * x) - 1\n"


def interpreted(source: str) -> Callable[..., Any]:
    """Load the generated program to run on CPU tensors with interpreted kernels."""
    source = source.partition("\ndef get_args")[0]
    for old, new, always in (
        ("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = int", True),
        ("with torch.cuda._DeviceGuard(0):", "if True:", True),
        ("torch.cuda.set_device(0)", "pass", True),
        ("empty_strided_cuda(", "empty_strided_cpu(", True),
        ("\n@triton_heuristics.", TANH + "\n@triton_heuristics.", True),
        ("libdevice.tanh(", "tanh_(", False),
    ):
        assert old in source or not always, f"no {old!r} in the generated program"
        source = source.replace(old, new)

    def launching(**blocks: int) -> Callable[..., Any]:
        return lambda inductor_meta, **_: lambda function: Launch(function, inductor_meta["grid_type"], blocks)

    with mock.patch.multiple(
        triton_heuristics,
        template=launching(),
        persistent_reduction=launching(XBLOCK=64),
        reduction=launching(XBLOCK=64, R0_BLOCK=64),
    ):
        return PyCodeCache.load(source).call


def multiply_bfloat16_as_float32() -> None:
    """Convert the operands of `dot` to fp32: Triton's interpreter would multiply the bits of bfloat16 values."""
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


# --- the cases ---------------------------------------------------------------------------------------


def spans_of(row: list[list[int]]) -> tuple[Tensor, int]:
    """Return the spans of a row of prompts, each with its responses, and the number of tokens."""
    return torch.tensor(row_spans(row)), sum(map(sum, row))


def random_states(case: Case, tokens: int) -> list[Tensor]:
    """Return query, key and value with the strides of transformers' layers: [1, T, H, D] transposed."""
    torch.manual_seed(0)
    heads = (case.heads[0], case.heads[1], case.heads[1])
    dtype = getattr(torch, case.dtype)
    states = [torch.randn(1, tokens, number, case.size, dtype=torch.float32).to(dtype) for number in heads]
    return [state.transpose(1, 2).requires_grad_(case.gradients) for state in states]


def mark_partial_block_as_full(shared: attention.SharedPrefix, window: int | None) -> None:
    mask = shared.block_mask(window)
    row = int(mask.kv_num_blocks[0, 0].argmax())
    last, full = int(mask.kv_num_blocks[0, 0, row]) - 1, int(mask.full_kv_num_blocks[0, 0, row])
    mask.full_kv_indices[0, 0, row, full] = mask.kv_indices[0, 0, row, last]
    mask.full_kv_num_blocks[0, 0, row] += 1
    mask.kv_num_blocks[0, 0, row] -= 1


def errors(case: Case, row: list[list[int]]) -> dict[str, float]:
    """Return the largest difference of output and gradients from the fp32 reference, relative to its largest value."""
    spans, tokens = spans_of(row)
    scores = attention.Scores(None, case.window, case.softcap)
    shared = attention.SharedPrefix(spans, tokens)
    if case.corrupt_mask:
        mark_partial_block_as_full(shared, case.window)
    states = random_states(case, tokens)
    exact = [state.detach().float().requires_grad_(case.gradients) for state in states]
    found = [attention._by_blocks(*states, shared, scores)]
    expected = [attention.dense_attention(*exact, attention.dense_mask(spans, tokens, case.window), scores)]
    if case.gradients:
        found += torch.autograd.grad(found[0].float().sin().sum(), states)
        expected += torch.autograd.grad(expected[0].sin().sum(), exact)
    names = ("output", "query", "key", "value")
    return {
        name: float((ours - reference).abs().max() / reference.abs().max())
        for name, ours, reference in zip(names, found, expected, strict=False)
    }


def run_case(case: Case) -> dict[str, Any]:
    kernels: list[dict[str, Any]] = []

    def finish(graph: GraphLowering) -> Callable[..., Any]:
        source = graph.codegen()[0].value
        if MODE == "run":
            return interpreted(source)
        kernels.extend(
            compiled(source, case.card) if MODE == "compile" else [{"name": name} for name, _ in templates(source)]
        )
        return stop

    torch._dynamo.reset()
    graphs = torch.compile(torch_flex.flex_attention, dynamic=True, backend=backend(case, finish))
    limit = SHARED_MEMORY[case.card] * 1024
    found = []
    with mock.patch.multiple(flex, _compiled=lambda: graphs, _shared_memory=lambda _: limit):
        for row in case.rows:
            with contextlib.suppress(StoppedError):
                found.append(errors(case, row))
    return {"errors": found} if MODE == "run" else {"kernels": kernels}


def main() -> None:
    patch_torch()
    if MODE == "run":
        multiply_bfloat16_as_float32()
    for number, given in enumerate(json.loads(sys.argv[2])):
        start = time.process_time()
        try:
            result = run_case(Case(**given))
        except Exception as error:  # noqa: BLE001
            result = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        result["seconds"] = round(time.process_time() - start, 1)
        print(json.dumps({"case": number} | result), flush=True)  # noqa: T201


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as SCRATCH:
        main()
