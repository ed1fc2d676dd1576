"""Check, without a GPU, that a training step mixes no devices and never synchronizes with the device.

    python tests/forward_without_gpu.py

The forward uses fake CUDA tensors, which have a device and a shape but no values, so `.item()` or `nonzero` raises. The
backward uses `meta` tensors, which have no values either, because fake CUDA tensors crash a CPU build of torch there.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from tiny import SMALL
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from spin_plugin.model import attention, flex
from spin_plugin.model.attention import enable
from spin_plugin.model.forward import install, logps
from spin_plugin.model.layout import PairCollator
from spin_plugin.objective.losses import Objective, spin_terms
from spin_plugin.objective.metrics import metric_sums

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}
ROWS = [
    {"prompt": [5] * prompt, "real": [6] * real, "synthetic": [7] * synthetic, "index": index}
    for index, (prompt, real, synthetic) in enumerate([(40, 50, 60), (3, 200, 1), (30, 5, 5)])
]


def collated(layout: str) -> dict[str, Tensor]:
    collator = PairCollator(SimpleNamespace(pad_token_id=0, eos_token_id=1))
    collator.shared_prefix = layout == "shared"
    return collator(ROWS)


def make(architecture: str, layout: str, device: str) -> Any:
    config = AutoConfig.for_model(architecture, **(SMALL | MODELS[architecture]))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    install(model)
    if layout == "shared":
        enable(model)
    return model


def get_item(tensor: Tensor, index: Any) -> Tensor:
    """Implement `Tensor.__getitem__` with dispatched operators."""
    parts = index if isinstance(index, tuple) else (index,)
    consuming = sum(part is not None and part is not Ellipsis for part in parts)
    gathered: list[Tensor | None] = []
    for part in parts:
        place = len(gathered)
        if part is Ellipsis:
            gathered += [None] * (tensor.dim() - place - consuming)
            continue
        if isinstance(part, int):
            tensor = tensor.select(place, part)
        else:
            if part is None:
                tensor = tensor.unsqueeze(place)
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, place, part.start, part.stop, part.step or 1)
            gathered.append(part if isinstance(part, Tensor) else None)
        consuming -= part is not None
    return torch.ops.aten.index(tensor, gathered) if any(part is not None for part in gathered) else tensor


def set_item(tensor: Tensor, index: tuple[Tensor, ...], value: Tensor) -> None:
    torch.ops.aten.index_put_(tensor, list(index), value)


class Dispatched(TorchFunctionMode):
    """Route a few methods through the dispatcher; their Python bindings need a CUDA guard that a CPU build lacks."""

    operators: ClassVar[dict[Any, Any]] = {
        Tensor.__getitem__: get_item,
        Tensor.__setitem__: set_item,
        Tensor.__invert__: torch.bitwise_not,
        Tensor.contiguous: torch.ops.aten.contiguous,
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.operators.get(function, function)(*args, **(kwargs or {}))


def on_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """Move a `meta` model to the fake GPU; `Module.to` does not support fake tensors."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(moved(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, moved(buffer))
    return model


def step(model: Any, batch: dict[str, Tensor], opponent: Tensor) -> Tensor:
    """Compute the loss and the metrics of a micro-batch like the trainer."""
    policy = logps(model, batch)
    terms = spin_terms(policy, opponent[batch["responses"]], batch["sides"], Objective(beta=0.1))
    sums = metric_sums(terms, policy, batch["lengths"], batch["sides"], Objective())
    assert sums.device == policy.device == opponent.device
    return terms.loss.sum()


@contextlib.contextmanager
def kernel(replacement: Callable[..., Tensor]) -> Iterator[None]:
    with mock.patch.multiple(flex, _compiled=lambda: replacement, _shared_memory=lambda _: 99 * 1024):
        yield


def check_devices(query: Tensor, key: Tensor, value: Tensor, score_mod: Any, mask: BlockMask, **_: Any) -> Tensor:
    """Replace the kernel by a check that its inputs are on one device; test_kernels.py covers the kernel itself."""
    index = torch.zeros((), dtype=torch.int32, device=query.device)
    read = [key, value, mask.mask_mod(index, index, index, index)]
    read += [part for part in mask.as_tuple() if isinstance(part, Tensor)]
    if score_mod is not None:
        read.append(score_mod(index.float(), index, index, index, index))
    assert {tensor.device for tensor in read} == {query.device}
    return torch.empty_like(query)


def forward(architecture: str, layout: str) -> None:
    on_cpu, model = collated(layout), make(architecture, layout, "meta")
    with FakeTensorMode() as fake, Dispatched(), torch.no_grad(), kernel(check_devices):
        batch = {name: fake.from_tensor(tensor).to("cuda:0") for name, tensor in on_cpu.items()}
        step(on_gpu(model), batch, torch.empty(2 * len(ROWS), device="cuda:0"))


def backward(architecture: str, layout: str) -> None:
    def unmasked(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    model = make(architecture, layout, "meta")
    batch = {name: tensor.to("meta") for name, tensor in collated(layout).items()}
    no_autocast = {"is_autocast_enabled": lambda *_: False, "autocast": lambda *_, **__: contextlib.nullcontext()}
    with (
        kernel(unmasked),
        mock.patch.object(attention, "_by_pair", attention._by_blocks),
        mock.patch.multiple(torch, **no_autocast),  # `meta` does not support autocast
    ):
        step(model, batch, torch.empty(2 * len(ROWS), device="meta")).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


CHECKS: dict[str, Callable[[str, str], None]] = {"forward": forward, "backward": backward}


def main() -> None:
    for architecture in MODELS:
        # In a real padded forward, transformers synchronizes once to see if a mask is needed; fake tensors skip that.
        for check, layout in (("forward", "shared"), ("forward", "padded"), ("backward", "shared")):
            CHECKS[check](architecture, layout)
            print(json.dumps({"check": check, "model": architecture, "layout": layout}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
