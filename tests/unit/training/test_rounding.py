"""Masters begin at random places within their bf16 step, so that the forward and the saved model see every movement."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimi import AdamW
from torch import nn

from spin_plugin.training.rounding import (
    RoundMasters,
    dither_masters,
    dither_residuals,
    dithered,
    round_masters,
    rounded_stochastically,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def bf16_model(size: int = 64) -> nn.ModuleDict:
    """fp32 masters that are bf16 numbers; the head is tied to `tied`."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(size, size),
            "tied": nn.Embedding(size, size),
            "norm": nn.LayerNorm(size),
            "layer": nn.Linear(size, size),
            "router": nn.Linear(size, size, bias=False),
            "frozen": nn.Linear(size, size, bias=False),
            "head": nn.Linear(size, size, bias=False),
        }
    )
    model["head"].weight = model["tied"].weight
    model["frozen"].requires_grad_(False)
    return model.bfloat16().float()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- one tensor ------------------------------------------------------------------------------------


def test_dithered_values_round_to_where_they_came_from() -> None:
    edges = torch.tensor([1.0, -1.0, 2**-7, -(2.0**100), torch.finfo(torch.bfloat16).max, 2**-126, 0.0, -0.0])
    values = torch.cat([torch.randn(1 << 16, generator=generator()).bfloat16().float(), edges, -edges])
    moved = dithered(values, generator())
    assert torch.equal(moved.bfloat16().float(), values)
    assert (moved != values).double().mean() > 0.999
    unmoved = torch.tensor([float("inf"), float("-inf"), 1 + 2**-20])  # the last is no bf16 number
    assert torch.equal(dithered(unmoved, generator()), unmoved)
    assert torch.equal(dithered(values, generator()), moved), "the same seed gives the same noise"


def test_dither_is_uniform_within_the_bf16_step() -> None:
    """Above 1, bf16 numbers are 2^-7 apart."""
    value, step = 1.5, 2**-7
    places = (dithered(torch.full((1 << 16,), value), generator()).double() - value) / step
    assert places.abs().max() < 0.5
    assert torch.histc(places, bins=10, min=-0.5, max=0.5).tolist() == pytest.approx([6554] * 10, rel=0.05)


@pytest.mark.parametrize("share", [0.1, 0.25, -0.25, 0.7])
def test_a_movement_of_part_of_a_step_moves_that_part_of_the_weights(share: float) -> None:
    value, step = torch.full((1 << 16,), 1.5), 2**-7
    masters = dithered(value, generator()) + share * step
    moved = (masters.bfloat16().float() - value) / step
    assert moved.double().mean().item() == pytest.approx(share, abs=0.01)
    nearest = (value + share * step).bfloat16().float()
    assert torch.equal(nearest, value if abs(share) < 0.5 else value + step), "without dither all or none"


def test_stochastic_rounding_is_unbiased() -> None:
    """1 + 2^-9 is a quarter of the way from 1 to the next bf16 value, 1 + 2^-7."""
    value, step = 1 + 2**-9, 2**-7
    values = torch.tensor([value, -value, 1.0, 0.0, float("inf"), 2**-130 + 2**-140]).repeat(20_000, 1)
    rounded = rounded_stochastically(values, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    assert set(rounded[:, 0].tolist()) == {1.0, 1 + step}
    assert rounded[:, 0].double().mean().item() == pytest.approx(value, abs=step / 100)
    assert rounded[:, 1].double().mean().item() == pytest.approx(-value, abs=step / 100)
    assert torch.equal(rounded[:, 2:5].float(), values[:, 2:5]), "bf16 values are unchanged"
    assert torch.equal(rounded, rounded_stochastically(values, torch.Generator().manual_seed(0)))


# --- a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [False, True])
def test_only_masters_that_the_forward_rounds_are_dithered(everywhere: bool) -> None:
    """Autocast rounds the operands of matrix products; FSDP and DeepSpeed cast every weight."""
    model = bf16_model()
    before = weights_of(model)
    dither_masters(model, kept=["router.weight"], seed=1, everywhere=everywhere)
    after = weights_of(model)
    moved = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    products = {"tied.weight", "layer.weight"}
    # the norm's bias is zero, and zeros stay zero
    assert moved == products | ({"table.weight", "norm.weight", "layer.bias"} if everywhere else set())
    assert all(torch.equal(after[name].bfloat16().float(), weight) for name, weight in before.items())


def test_masters_end_as_the_forward_saw_them() -> None:
    model = bf16_model()
    dither_masters(model, kept=["router.weight"], seed=1, everywhere=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator()))
    before = weights_of(model)
    round_masters(model, kept=["router.weight"], seed=1, everywhere=False)
    after = weights_of(model)
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in ("tied.weight", "layer.weight"))
    assert all(torch.equal(after[name], before[name]) for name in ("frozen.weight", "router.weight"))
    table = after["table.weight"]
    assert torch.equal(table, table.bfloat16().float())
    assert not torch.equal(table, before["table.weight"].bfloat16().float()), "not dithered, so rounded stochastically"
    assert (table - before["table.weight"]).double().mean().abs() < 2e-4


@pytest.mark.parametrize(("step", "adapter"), [(0, False), (0, True), (5, False)])
def test_masters_are_dithered_once_and_adapters_stay_so(step: int, adapter: bool) -> None:
    """At a later step training resumes from a checkpoint, whose masters are dithered."""
    model = bf16_model()
    before = weights_of(model)["layer.weight"]
    callback = RoundMasters([], everywhere=False, iteration=0, adapter=adapter)
    events: Any = (SimpleNamespace(seed=1), SimpleNamespace(global_step=step), None)
    callback.on_train_begin(*events, model=model)
    began = weights_of(model)["layer.weight"]
    assert torch.equal(began, before) is (step > 0)
    callback.on_train_begin(*events, model=model)
    assert torch.equal(weights_of(model)["layer.weight"], began)
    callback.on_train_end(*events, model=model)
    assert torch.equal(weights_of(model)["layer.weight"], began if adapter else before)


def test_every_iteration_has_its_own_noise() -> None:
    noise = []
    for iteration in (0, 1):
        model = bf16_model()
        callback = RoundMasters([], everywhere=False, iteration=iteration, adapter=False)
        events: Any = (SimpleNamespace(seed=1), SimpleNamespace(global_step=0), None)
        callback.on_train_begin(*events, model=model)
        noise.append(weights_of(model)["layer.weight"] - weights_of(bf16_model())["layer.weight"])
    correlation = torch.corrcoef(torch.stack([each.flatten() for each in noise]))[0, 1].abs().item()
    assert correlation < 0.1


def movement_seen_by_the_forward(*, dither: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Train a layer in bf16 and in fp32 by less than half a step; returns both changes of its output."""
    changes = []
    for exact in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(256, 256, bias=False)
        nn.init.normal_(layer.weight, std=0.05)
        layer = layer.bfloat16().float()
        inputs, target = torch.randn(512, 256), torch.randn(512, 256)
        if dither and not exact:
            dither_masters(layer, kept=(), seed=0, everywhere=False)

        def output(layer: nn.Module = layer, inputs: torch.Tensor = inputs, exact: bool = exact) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
                return layer(inputs).float()

        before = output().detach()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-6, weight_decay=0.0)
        for _ in range(20):  # 2e-5 at most; bf16 numbers near 0.05 are 2.4e-4 apart
            (output() - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append((output().detach() - before).flatten().double())
    return changes[0], changes[1]


def test_the_forward_sees_movements_below_half_a_step() -> None:
    exact, seen = movement_seen_by_the_forward(dither=True)
    assert (seen @ exact / (exact @ exact)).item() == pytest.approx(1, abs=0.15)
    exact, seen = movement_seen_by_the_forward(dither=False)
    assert (seen @ exact / (exact @ exact)).item() < 0.3


def test_residuals_of_compensated_summation_are_dithered() -> None:
    """Ten updates of -1e-4 move a weight of 1, whose lower neighbor is 1 - 2^-8, by a quarter of the distance."""
    model = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, foreach=False)
    for number in range(10):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        if number == 0:
            dither_residuals(model, optimizer.state, seed=1)
    assert set(model.weight.unique().tolist()) == {1.0, 1 - 2**-8}
    assert model.weight.double().mean().item() == pytest.approx(1 - 1e-3, abs=2e-4)
