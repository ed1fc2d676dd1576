"""Choose the layout of a model's pairs: shared-prefix, padded, or neither.

The reference is the model's own forward on one unpadded sequence `prompt | response`. Once, before scoring,
`choose_layout` compares both layouts with it on a few pairs of the data. It picks shared-prefix if its values and
gradients agree, otherwise padded if its values agree, and otherwise refuses the model. Compiling an attention kernel
can fail on a single rank, so this is tried outside the model first, where no collective can hang.
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
from spin_plugin.model.layout import (
    Group,
    Pair,
    groups_of,
    padded_batch,
    sequences_of,
    shared_prefix_batch,
    single_batch,
)
from spin_plugin.model.probe import EXACT, ROUGH, Deviation, Tolerance, squares
from spin_plugin.model.support import causal_lm, family, needs_own_logits, unsupported_reason
from spin_plugin.model.tracing import attention_calls, linear_dtypes

Batch = dict[str, Tensor]
HEAD_TOKENS = 256
"""Most tokens of a prompt and of a response on which the chunked head is compared with the model's own logits."""
MAX_GRADIENT_ELEMENTS = 2**22
"""Gradients with more elements than this are not compared."""
COMPARED_GRADIENTS = 8
"""Gradients that are compared: those of the first parameters, which depend on every layer."""
SIDE_WEIGHTS = (2.0, -1.0)
"""Weights of real and other responses in the sum that is differentiated."""


# --- the choice ----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a model computes the log-probs of pairs."""

    shared_prefix: bool
    """Prompts are followed by all their responses in one row; otherwise every response is a padded sequence."""
    own_logits: bool
    """Use the model's own logits, because the chunked head disagrees with them."""
    padded_reason: str | None = None
    """Why the layout is padded although shared-prefix was requested."""


def choose_layout(
    model: nn.Module,
    rows: Sequence[Sequence[Pair]],
    *,
    requested: bool,
    pad_token_id: int,
    grouped: bool = False,
    device: torch.device | None = None,
    gather: Callable[[Any], list[Any]] = lambda found: [found],
) -> Layout:
    """Choose the layout by the model's class and by a comparison with one sequence at a time.

    Every rank must call this with the same rows. Enables shared-prefix attention if that layout is chosen; leaves the
    weights, the training mode and the RNG state unchanged, and no gradients behind.

    Args:
        model: as trained, wrapped or not; `install` must have been called.
        rows: the result of `probe`.
        requested: whether the shared-prefix layout is requested.
        pad_token_id: for the padded layout.
        grouped: whether pairs of one prompt share their prompt and real response.
        device: where the model computes; defaults to its parameters' device, which is wrong if FSDP offloads them.
        gather: returns every rank's argument, in the same order on all ranks.

    Raises:
        SpinError: neither layout agrees with one sequence at a time.
    """
    # Compare uncompiled: only one of the two layouts is worth compiling. FSDP's subclass must not be unwrapped.
    if type(model) is OptimizedModule:
        model = model._orig_mod
    device = device or next(causal_lm(model).parameters()).device
    training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()
    # With torch_compile: true, a kernel that fails to compile would run eagerly and allocate [heads, T, T].
    with torch.random.fork_rng(devices), torch._dynamo.config.patch(suppress_errors=False), torch.no_grad():
        try:
            return _Choice(model, rows, pad_token_id, grouped, device, gather).layout(requested=requested)
        finally:
            model.train(training)


class _Choice:
    """The comparison for one model: the batches of both layouts and the expected log-probs."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Sequence[Pair]],
        pad_token_id: int,
        grouped: bool,
        device: torch.device,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.model, self.inner, self.device, self.gather = model, causal_lm(model), device, gather
        self.name = family(self.inner).__name__
        self.own_logits = needs_own_logits(self.inner)
        self.padded = [self._on_device(padded_batch(row, pad_token_id, grouped=grouped)) for row in rows]
        self.shared = [self._on_device(shared_prefix_batch(row, grouped=grouped)) for row in rows]
        self.groups = [groups_of(row, grouped=grouped) for row in rows]
        self.alone = [self._alone(groups) for groups in self.groups]
        self.tolerance = self._choose_head(rows[0][0])
        self.expected = [torch.cat([self._logps(batch) for batch in batches]) for batches in self.alone]

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _alone(self, groups: Sequence[Group]) -> list[Batch]:
        """Return every response of a row as its own sequence."""
        return [self._on_device(single_batch(*sequence)) for sequence in sequences_of(groups)]

    def _logps(self, batch: Batch) -> Tensor:
        return logps(self.model, batch, own_logits=self.own_logits)

    # --- head --------------------------------------------------------------------------------

    def _choose_head(self, pair: Pair) -> Tolerance:
        """Choose between the chunked head and the model's own logits; returns the tolerance for the model's dtypes."""
        batch = self._on_device(single_batch(pair.prompt[-HEAD_TOKENS:], pair.real[:HEAD_TOKENS]))
        with linear_dtypes(self.inner) as dtypes:
            own = logps(self.model, batch, own_logits=True)
        tolerance = EXACT if self._is_exact(dtypes) else ROUGH
        if not self.own_logits:
            found: list[Deviation] = []

            def compare() -> None:
                found.append(Deviation.of(logps(self.model, batch, own_logits=False), own, batch["lengths"]))

            # RemBERT's head, for one, does not accept the decoder's output.
            failed = self._failure(compare) is not None
            self.own_logits = failed or self._worst(found).per_root_token > tolerance.low
        return tolerance

    def _is_exact(self, dtypes: set[torch.dtype]) -> bool:
        """Return whether the model computes in full fp32 or better, without quantization or TF32."""
        quantized = getattr(self.inner.config, "quantization_config", None) is not None
        tf32 = self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return dtypes <= {torch.float32, torch.float64} and not quantized and not tf32

    # --- layouts -----------------------------------------------------------------------------

    def layout(self, *, requested: bool) -> Layout:
        padded = self._deviation(self.padded)
        reason = unsupported_reason(self.model) if requested else None
        if requested and reason is None:
            reason = self._shared_prefix_fault(padded)
        if not requested or reason is not None:
            self._require_padded(padded)
        return Layout(requested and reason is None, self.own_logits, reason)

    def _require_padded(self, deviation: Deviation) -> None:
        if deviation.per_root_token > self.tolerance.high:
            raise SpinError(
                f"base_model: {self.name} cannot be trained on pairs, because its log-probs in a batch differ from one "
                f"sequence at a time by {deviation.per_token:.2g} nats per token; use another base_model"
            )

    def _shared_prefix_fault(self, padded: Deviation) -> str | None:
        """Return why shared-prefix is rejected, or None and leave its attention enabled."""
        before = self.inner.config._attn_implementation
        expected = self._gradients()
        enable(self.model)
        reason = self._kernel_fault() or self._values_fault(padded) or self._gradients_fault(expected)
        if reason is not None:
            self.inner.set_attn_implementation(before)
        return reason

    def _kernel_fault(self) -> str | None:
        """Run attention outside the model, forward and backward, for every signature that the model uses."""
        with attention_calls() as calls:
            self._logps(self.alone[0][0])

        def run() -> None:
            for batch, call in product(self.shared, sorted(calls, key=str)):
                call.run(batch["spans"], batch["input_ids"].shape[1])

        return self._failure(run)

    def _values_fault(self, padded: Deviation) -> str | None:
        found: list[Deviation] = []
        if reason := self._failure(lambda: found.append(self._deviation(self.shared))):
            return reason
        # Rounding in this model may be coarse: up to three times the padded layout's deviation is accepted.
        accepted = max(self.tolerance.low, 3 * min(padded.per_root_token, self.tolerance.high))
        if found[0].per_root_token <= accepted:
            return None
        return (
            f"log-probs of {self.name} in the shared-prefix layout differ from one sequence at a time by "
            f"{found[0].per_token:.2g} nats per token"
        )

    def _deviation(self, batches: Sequence[Batch]) -> Deviation:
        pairs = zip(batches, self.expected, strict=True)
        return self._worst([Deviation.of(self._logps(batch), own, batch["lengths"]) for batch, own in pairs])

    def _worst(self, found: list[Deviation]) -> Deviation:
        """Return the largest deviation on any rank, so that all ranks decide alike."""
        return Deviation(*max(self.gather(max(found))))

    def _failure(self, run: Callable[[], Any]) -> str | None:
        """Return how `run` fails on any rank, or None.

        Any exception counts, because compilers raise all kinds, except running out of memory, which is raised.
        """
        reason = None
        try:
            run()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"shared-prefix attention fails for {self.name}: {type(error).__name__}: {_first_line(error)}"
        return next(filter(None, self.gather(reason)), None)

    # --- gradients ---------------------------------------------------------------------------

    def _gradients(self) -> dict[str, Tensor] | None:
        """Return the gradients of the first row, computed one sequence at a time, or None if they are no reference."""
        if not _takes_gradients(self.model):
            return None
        self.model.zero_grad(set_to_none=True)
        found = [
            Deviation.of(self._backward(batch, weight), value[None], batch["lengths"])
            for batch, weight, value in zip(self.alone[0], self._weights(), self.expected[0], strict=True)
        ]
        gradients = self._take_gradients()
        # In training mode some routers add noise; the gradients are then not comparable.
        return gradients if self._worst(found).per_root_token <= self.tolerance.low else None

    def _weights(self) -> Tensor:
        """Return the [R] weights of the first row's responses in the sum that is differentiated."""
        real, other = SIDE_WEIGHTS
        responses, groups = len(self.alone[0]), len(self.groups[0])
        return torch.tensor([real] * groups + [other] * (responses - groups), device=self.device)

    def _gradients_fault(self, expected: dict[str, Tensor] | None) -> str | None:
        if expected is None:
            return None
        if reason := self._failure(lambda: self._backward(self.shared[0], self._weights())):
            self.model.zero_grad(set_to_none=True)
            return reason
        local = squares(self._take_gradients(), expected)
        difference, size = (sum(part) for part in zip(*self.gather(local), strict=True))
        if difference <= self.tolerance.gradient**2 * size:
            return None
        relative = f"{math.sqrt(difference / size):.2g} of their norm" if size else "all of their norm"
        return f"gradients of {self.name} in the shared-prefix layout differ from one sequence at a time by {relative}"

    def _backward(self, batch: Batch, weight: Tensor) -> Tensor:
        """Accumulate the gradients of the weighted sum as a training step would; returns the log-probs."""
        self.model.train()  # gradient checkpointing is only active in training mode
        try:
            with torch.enable_grad():
                found = self._logps(batch)
                (weight * found).sum().backward()
        finally:
            self.model.eval()
        return found.detach()

    def _take_gradients(self) -> dict[str, Tensor]:
        """Copy this rank's shards of the first few gradients that are not too large, then clear all gradients."""
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and len(gradients) < COMPARED_GRADIENTS:
                local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                if local.numel() <= MAX_GRADIENT_ELEMENTS:
                    gradients[name] = local.float().clone()
        self.model.zero_grad(set_to_none=True)
        return gradients


def _takes_gradients(model: nn.Module) -> bool:
    """Return whether `backward` only accumulates gradients.

    DeepSpeed replaces it by an engine method, and some optimizers step from hooks inside it.
    """
    hooked = any(value._post_accumulate_grad_hooks or value._backward_hooks for value in model.parameters())
    return not hooked and not hasattr(model, "backward")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
