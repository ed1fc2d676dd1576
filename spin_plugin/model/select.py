"""Which layout a model's pairs take: rows that share their prompts, padded sequences, or none.

A response's log-probability is by definition what the model's own forward says of `prompt | response` alone, without
padding. `choose_layout` compares both layouts with that on a few whole pairs of the data, values and gradients, once,
before anything is scored: shared prefixes are chosen where they agree, else padded sequences where those agree, and a
model that agrees in neither is refused. What may fail on one rank alone, compiling an attention kernel, is tried
outside of the model first, where no rank waits for another.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.tensor import DTensor

from spin_plugin.console import SpinError
from spin_plugin.model.attention import enable
from spin_plugin.model.forward import logps
from spin_plugin.model.layout import Pair, padded_batch, shared_prefix_batch, single_batch
from spin_plugin.model.probe import EXACT, ROUGH, Apart, Tolerance
from spin_plugin.model.support import causal_lm, family, needs_own_logits, unsupported_reason
from spin_plugin.model.tracing import attention_calls, linear_dtypes

Batch = dict[str, Tensor]
HEAD_TOKENS = 256
"""Positions at which the chunked head is compared with the model's own logits; a head knows no positions."""
COMPARED = 2**22
"""Elements of a parameter at most whose gradient is copied and compared."""
PARAMETERS = 8
"""Parameters whose gradients are compared; the first ones, whose gradients have come through all layers."""
WEIGHTS = (2.0, -1.0)
"""Of real and synthetic responses in the sum whose gradient is compared; unequal ones, since responses may be equal."""


# --- what is decided -----------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a model computes log-probabilities of pairs."""

    shared_prefix: bool
    """Each pair is one row `prompt | real | synthetic`; else it is two padded sequences."""
    own_logits: bool
    """The chunked head disagrees with the model's own logits, which are used instead."""
    not_shared_because: str | None = None
    """Why it is padded although a shared prefix was wanted."""


def choose_layout(
    model: nn.Module,
    rows: Sequence[Sequence[Pair]],
    *,
    wanted: bool,
    pad_token_id: int,
    device: torch.device | None = None,
    gather: Callable[[Any], list[Any]] = lambda found: [found],
) -> Layout:
    """Decide how a model is run, by what is known of it and by a comparison with one sequence at a time.

    Every rank must call it, with the same rows. Turns on the attention of shared prefixes where they are chosen. The
    model, its gradients and the state of the random numbers are as before.

    Args:
        model: as it is trained; `install` has been called.
        rows: pairs of `probe`.
        wanted: whether a shared prefix is wanted.
        pad_token_id: for the padded layout.
        device: where the model computes; None is where its parameters lie, which FSDP may have moved away.
        gather: collects what every rank hands in, in a list that is the same on all ranks.

    Raises:
        SpinError: neither layout gives what one sequence at a time gives.
    """
    if type(model) is OptimizedModule:  # FSDP makes a class of its own of it, which must stay
        model = model._orig_mod  # each layout would be compiled, and only one is used afterwards
    device = device or next(causal_lm(model).parameters()).device
    training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()
    # torch_compile: true lets a kernel that does not compile run eagerly, with memory for [heads, T, T]
    with torch.random.fork_rng(devices), torch._dynamo.config.patch(suppress_errors=False), torch.no_grad():
        try:
            return _Choice(model, rows, pad_token_id, device, gather).layout(wanted=wanted)
        finally:
            model.train(training)


class _Choice:
    """One model's comparison: the pairs as batches on its device, and what one sequence at a time says of them."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Sequence[Pair]],
        pad_token_id: int,
        device: torch.device,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.model, self.inner, self.device, self.gather = model, causal_lm(model), device, gather
        self.name = family(self.inner).__name__
        self.own_logits = needs_own_logits(self.inner)
        self.padded = [self._on_device(padded_batch(row, pad_token_id)) for row in rows]
        self.shared = [self._on_device(shared_prefix_batch(row)) for row in rows]
        self.alone = [self._alone(row) for row in rows]
        self.tolerance = self._settle_head(rows[0][0])
        self.expected = [torch.cat([self._logps(batch) for batch in batches]) for batches in self.alone]

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _alone(self, row: Sequence[Pair]) -> list[Batch]:
        """Every response of a row as a sequence of its own, in the order of the other layouts: the real ones first."""
        responses = [(pair.prompt, pair.real) for pair in row] + [(pair.prompt, pair.synthetic) for pair in row]
        return [self._on_device(single_batch(prompt, response)) for prompt, response in responses]

    def _logps(self, batch: Batch) -> Tensor:
        return logps(self.model, batch, own_logits=self.own_logits)

    # --- head --------------------------------------------------------------------------------

    def _settle_head(self, pair: Pair) -> Tolerance:
        """Choose between the chunked head and the model's own logits; returns what rounding explains."""
        batch = self._on_device(single_batch(pair.prompt[-HEAD_TOKENS:], pair.real[:HEAD_TOKENS]))
        with linear_dtypes(self.inner) as dtypes:
            own = logps(self.model, batch, own_logits=True)
        tolerance = EXACT if self._is_exact(dtypes) else ROUGH
        if not self.own_logits:
            found: list[Apart] = []

            def compare() -> None:
                found.append(Apart.of(logps(self.model, batch, own_logits=False), own, batch["lengths"]))

            # a head that does not even take the decoder's output (RemBERT's) is not understood either
            failed = self._failure(compare) is not None
            self.own_logits = failed or self._worst(found).rounding > tolerance.least
        return tolerance

    def _is_exact(self, dtypes: set[torch.dtype]) -> bool:
        """Does the model compute in 32 bits, with no more error than that has?"""
        quantised = getattr(self.inner.config, "quantization_config", None) is not None
        tf32 = self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return dtypes <= {torch.float32, torch.float64} and not quantised and not tf32

    # --- layouts -----------------------------------------------------------------------------

    def layout(self, *, wanted: bool) -> Layout:
        padded = self._apart(self.padded)
        reason = unsupported_reason(self.model) if wanted else None
        if wanted and reason is None:
            reason = self._shared_prefix_fault(padded)
        if not wanted or reason is not None:
            self._require_padded(padded)
        return Layout(wanted and reason is None, self.own_logits, reason)

    def _require_padded(self, apart: Apart) -> None:
        if apart.rounding > self.tolerance.most:
            raise SpinError(
                f"{self.name} gives a response another log-probability in a batch than alone ({apart.a_token:.2g} nats "
                "a token), so it cannot be trained on pairs; use another base_model"
            )

    def _shared_prefix_fault(self, padded: Apart) -> str | None:
        """Why shared prefixes are not chosen, or None: then their attention stays on."""
        before = self.inner.config._attn_implementation
        expected = self._gradients(self.alone[0], self.expected[0])
        enable(self.model)
        reason = self._kernel_fault() or self._values_fault(padded) or self._gradients_fault(expected)
        if reason is not None:
            self.inner.set_attn_implementation(before)
        return reason

    def _kernel_fault(self) -> str | None:
        """Run the attention outside of the model, forward and backward, with the shapes that the model asks for."""
        with attention_calls() as calls:
            self._logps(self.alone[0][0])

        def run() -> None:
            for batch, call in product(self.shared, sorted(calls, key=str)):
                call.run(batch["spans"], batch["input_ids"].shape[1])

        return self._failure(run)

    def _values_fault(self, padded: Apart) -> str | None:
        found: list[Apart] = []
        if reason := self._failure(lambda: found.append(self._apart(self.shared))):
            return reason
        rounding = max(self.tolerance.least, 3 * min(padded.rounding, self.tolerance.most))
        if found[0].rounding <= rounding:
            return None
        return f"a row of {self.name} differs from one sequence at a time by {found[0].a_token:.2g} nats a token"

    def _apart(self, batches: Sequence[Batch]) -> Apart:
        pairs = zip(batches, self.expected, strict=True)
        return self._worst([Apart.of(self._logps(batch), own, batch["lengths"]) for batch, own in pairs])

    def _worst(self, found: list[Apart]) -> Apart:
        """Of all ranks: they must decide alike, whatever their devices round."""
        return Apart(*max(self.gather(max(found))))

    def _failure(self, run: Callable[[], Any]) -> str | None:
        """How `run` fails on some rank, or None. Whatever a compiler raises counts; too little memory does not."""
        reason = None
        try:
            run()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"the attention of a row fails for {self.name}: {type(error).__name__}: {_first_line(error)}"
        return next(filter(None, self.gather(reason)), None)

    # --- gradients ---------------------------------------------------------------------------

    def _gradients(self, batches: list[Batch], expected: Tensor) -> dict[str, Tensor] | None:
        """Of the first row, one sequence at a time, or None where there is nothing to compare with."""
        if not _takes_gradients(self.model):
            return None
        self.model.zero_grad(set_to_none=True)
        found = [
            Apart.of(self._backward(batch, weight), value[None], batch["lengths"])
            for batch, weight, value in zip(batches, self._weights(len(batches)), expected, strict=True)
        ]
        gradients = self._take_gradients()
        # noise in training, as some routers add it
        return gradients if self._worst(found).rounding <= self.tolerance.least else None

    def _weights(self, responses: int) -> Tensor:
        """[R] of a row's responses in the sum whose gradient is compared."""
        return torch.tensor(WEIGHTS, device=self.device).repeat_interleave(responses // 2)

    def _gradients_fault(self, expected: dict[str, Tensor] | None) -> str | None:
        if expected is None:
            return None
        weights = self._weights(len(self.alone[0]))
        if reason := self._failure(lambda: self._backward(self.shared[0], weights)):
            self.model.zero_grad(set_to_none=True)
            return reason
        here = _squares(self._take_gradients(), expected)
        apart, size = (sum(part) for part in zip(*self.gather(here), strict=True))
        if apart <= self.tolerance.gradient**2 * size:
            return None
        relative = f"{math.sqrt(apart / size):.2g} of their size" if size else "all of their size"
        return f"the gradients of a row of {self.name} differ from one sequence at a time by {relative}"

    def _backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Add the gradients of the weighted sum, as a step of training would; returns the log-probabilities."""
        self.model.train()  # gradient checkpointing works in training alone
        try:
            with torch.enable_grad():
                found = self._logps(batch)
                (weight * found).sum().backward()
        finally:
            self.model.eval()
        return found.detach()

    def _take_gradients(self) -> dict[str, Tensor]:
        """The gradients of parameters that are not large, a few of them, on this rank; none is left in the model."""
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and len(gradients) < PARAMETERS:
                share = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                if share.numel() <= COMPARED:
                    gradients[name] = share.float().clone()
        self.model.zero_grad(set_to_none=True)
        return gradients


def _takes_gradients(model: nn.Module) -> bool:
    """May backward be called for its gradients alone? DeepSpeed has a way of its own, some optimizers step in it."""
    hooked = any(value._post_accumulate_grad_hooks or value._backward_hooks for value in model.parameters())
    return not hooked and not hasattr(model, "backward")


def _squares(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """The squared distance of two sets of gradients, what is missing being 0, and the second one's squared size."""
    apart = sum(float((found.get(name, torch.zeros_like(own)) - own).square().sum()) for name, own in expected.items())
    return (apart if math.isfinite(apart) else math.inf), sum(float(own.square().sum()) for own in expected.values())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
