"""The choice of layout: each kind of family against one sequence at a time, and faults that must be caught."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import PAD, PROBE_ROWS, build, compare_layouts
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from spin_plugin.console import SpinError
from spin_plugin.model import attention, select
from spin_plugin.model.forward import install
from spin_plugin.model.layout import Pair
from spin_plugin.model.probe import MAX_ROW_PAIRS, MIN_ROW_TOKENS, probe
from spin_plugin.model.select import Layout, choose_layout

# --- probe pairs ---------------------------------------------------------------------------------


def pair_of(length: int) -> Pair:
    """Return a pair of `length` tokens; a fifth of them are the prompt."""
    prompt = length // 5 or 1
    real = (length - prompt) // 2
    tokens = [number % 200 + 3 for number in range(length)]
    return Pair(tokens[:prompt], tokens[prompt : prompt + real], tokens[prompt + real :])


def probed(lengths: list[int], longest: int | None = None) -> list[list[int]]:
    """Return the token counts of the pairs in each row of the probe."""
    rows = probe(torch.tensor(lengths, dtype=torch.int32), lambda index: pair_of(lengths[index]), longest)
    return [[sum(len(part) for part in pair) for pair in row] for row in rows]


def test_probe_of_long_pairs() -> None:
    """Rows: the shortest pair of several blocks, the shortest pair, the longest one lengthened, and several pairs."""
    lengths = [500, 900, 20, 310, 4000]
    assert probed(lengths)[:2] == [[310], [20]]
    assert probed(lengths)[3:] == [[500, 900, 20]]
    longest = probe(torch.tensor(lengths), lambda index: pair_of(lengths[index]))[2][0]
    assert len(longest.prompt) + len(longest.real) == 4000
    assert len(longest.synthetic) == 1600
    shorter = probe(torch.tensor(lengths), lambda index: pair_of(lengths[index]), 2500)[2][0]
    assert len(shorter.prompt) + len(shorter.real) == 2500


def test_probe_of_equal_responses_begins_with_two_that_differ() -> None:
    """An equal one is not computed, so nothing could see what it must not."""
    pairs = [Pair([3] * 300, [5, 6, 7], [5, 6, 7])] * 3
    (first,) = probe(torch.tensor([303] * 3), pairs.__getitem__)[0]
    assert first == Pair([3] * 300, [5, 6, 7], [5, 6])


@pytest.mark.parametrize("longest", [None, 120])
def test_probe_of_grouped_pairs_begins_with_one_prompt(longest: int | None) -> None:
    """With several synthetic responses; no sequence is longer than those of the data."""
    lengths = [200, 150, 20, 110]
    pairs = [pair_of(length) for length in lengths]
    first, *rest = probe(torch.tensor(lengths), pairs.__getitem__, longest, grouped=True)
    assert rest == probe(torch.tensor(lengths), pairs.__getitem__, longest)
    assert len(first) > 1
    assert {(*pair.prompt, *pair.real) for pair in first} == {(*pairs[0].prompt, *pairs[0].real)}
    assert longest is None or all(len(pair.prompt) + len(pair.synthetic) <= longest for pair in first)


@pytest.mark.parametrize("grouped", [False, True])
def test_probe_keeps_initial_responses(grouped: bool) -> None:
    """The lengthened pair is still as long as any sequence could be, and a prompt's row has one for each pair."""
    pairs = [pair_of(length)._replace(initial=[7] * (length // 10)) for length in (200, 150, 20, 110)]
    lengths = torch.tensor([sum(len(part) for part in pair) for pair in pairs])
    rows = probe(lengths, pairs.__getitem__, grouped=grouped)
    if grouped:
        assert [pair.initial for pair in rows.pop(0)] == [pair.initial for pair in pairs[:3]]
    longest = rows[2][0]
    assert [*longest.prompt, *longest.real] == [token for part in pairs[0] for token in part]


def test_probe_of_short_pairs_builds_a_row_of_several_blocks() -> None:
    rows = probed([40] * 100)
    assert rows[0] == [40] * 8
    assert sum(rows[0]) >= MIN_ROW_TOKENS
    assert len(probed([3] * 100)[0]) == MAX_ROW_PAIRS
    assert [len(row) for row in probed([30])] == [1, 1, 1]


# --- families ------------------------------------------------------------------------------------

CAPPED = {"attn_implementation": "eager", "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
FAMILIES: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {}, "shared", ""),
    ("mistral", {}, "shared", ""),
    ("gemma2", CAPPED, "shared", ""),
    ("olmoe", {}, "shared", ""),
    ("olmoe", {"sliding_window": 24}, "padded", "differ from one sequence at a time by 0.* nats per token"),
    ("phimoe", {"sliding_window": 24}, "padded", "differ from one sequence at a time by 0.* nats per token"),
    ("camembert", {}, "padded", "differ from one sequence at a time by 0.* nats per token"),
    ("bloom", {}, "padded", "does not use transformers' AttentionInterface"),
    ("mamba", {}, "padded", "state-space|does not use"),
    ("deepseek_v32", {}, "padded", ""),
    ("deepseek_v32", {"index_topk": 16}, "refused", "log-probs in a batch differ from one sequence at a time"),
    ("doge", {}, "refused", "base_model: DogeForCausalLM cannot be trained on pairs"),
    ("cpmant", {}, "refused", "CpmAntForCausalLM .*; use another base_model"),
]


@pytest.mark.parametrize(("family", "changes", "chosen", "reason"), FAMILIES)
def test_family(family: str, changes: dict[str, Any], chosen: str, reason: str) -> None:
    verdict = compare_layouts(family, **changes)
    assert verdict.chosen == chosen
    assert verdict.right, verdict
    assert re.search(reason, verdict.reason or ""), verdict


def choose(model: nn.Module, *, requested: bool = True, **options: Any) -> Layout:
    return choose_layout(model, PROBE_ROWS, requested=requested, pad_token_id=PAD, **options)


@pytest.fixture
def llama_model() -> Any:
    model = build("llama")
    install(model)
    return model


def test_model_that_is_wrong_in_both_layouts_is_refused_even_if_padded_is_requested() -> None:
    model = build("doge")
    install(model)
    with pytest.raises(SpinError, match="use another base_model"):
        choose(model, requested=False)


def test_ignored_window_is_detected_in_16_bits() -> None:
    """In 16 bits, rounding alone causes errors of 0.05 nats per token."""
    for window, shared in ((None, True), (24, False)):
        model = build("olmoe", sliding_window=window).bfloat16()
        install(model)
        assert choose(model).shared_prefix is shared


def test_ignored_window_is_detected_if_only_the_longest_pair_reaches_it() -> None:
    short, longest = [pair_of(60), pair_of(90)], [pair_of(400)]
    for rows, shared in (([short], True), ([short, longest], False)):
        model = build("olmoe", sliding_window=100)
        install(model)
        assert choose_layout(model, rows, requested=True, pad_token_id=PAD).shared_prefix is shared


# --- faults that must be caught ------------------------------------------------------------------


def test_correct_values_with_wrong_gradients_are_rejected(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by_pair = attention._by_pair
    monkeypatch.setattr(attention, "_by_pair", lambda query, key, *rest: by_pair(query, key.detach() + 0 * key, *rest))
    layout = choose(llama_model)
    assert not layout.shared_prefix
    reason = "gradients of LlamaForCausalLM in the shared-prefix layout differ from one sequence at a time by"
    assert reason in str(layout.padded_reason)


def test_nan_is_rejected(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by_pair = attention._by_pair
    monkeypatch.setattr(attention, "_by_pair", lambda *states: by_pair(*states) * torch.nan)
    assert "differ from one sequence at a time by inf" in str(choose(llama_model).padded_reason)


def fail(*_states: Any) -> Tensor:
    raise LookupError("no kernel for this card\nand a long traceback")


def test_kernel_failure_is_reported_in_one_line(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_by_pair", fail)
    reason = "shared-prefix attention fails for LlamaForCausalLM: LookupError: no kernel for this card"
    assert choose(llama_model) == (False, False, reason)
    assert llama_model.config._attn_implementation == "sdpa"


def test_kernel_whose_backward_fails_is_rejected(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: Tensor) -> Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return fail()

    by_pair = attention._by_pair
    monkeypatch.setattr(attention, "_by_pair", lambda *states: Fails.apply(by_pair(*states)))
    monkeypatch.setattr(select, "_takes_gradients", lambda _model: False)  # as with DeepSpeed: forward only
    assert "LookupError" in str(choose(llama_model).padded_reason)


def test_running_out_of_memory_is_not_a_kernel_failure(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_states: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "_by_pair", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        choose(llama_model)


def test_compilation_errors_are_not_suppressed(llama_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `torch_compile`, Axolotl sets `suppress_errors`: graphs that fail to compile run eagerly."""
    by_pair, seen = attention._by_pair, set()

    def recorded(*states: Any) -> Tensor:
        seen.add(torch._dynamo.config.suppress_errors)
        return by_pair(*states)

    monkeypatch.setattr(attention, "_by_pair", recorded)
    with torch._dynamo.config.patch(suppress_errors=True):
        choose(llama_model)
        assert torch._dynamo.config.suppress_errors
    assert seen == {False}


# --- the model is left unchanged -----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_model_is_unchanged_afterwards(llama_model: Any, training: bool) -> None:
    llama_model.train(training)
    before, state = {n: p.clone() for n, p in llama_model.named_parameters()}, torch.get_rng_state()
    assert choose(llama_model) == (True, False, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert llama_model.training is training
    for name, parameter in llama_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not any(part._forward_hooks for part in llama_model.modules())


def test_optimizer_hooks_do_not_run_in_backward(llama_model: Any) -> None:
    """Layer-wise optimizers step from a hook, here with gradients that are only meant for comparison."""
    steps: list[Tensor] = []
    llama_model.lm_head.weight.register_post_accumulate_grad_hook(steps.append)
    assert choose(llama_model).shared_prefix
    assert not steps


def test_noise_in_training_mode_does_not_reject_shared_prefix(llama_model: Any) -> None:
    """Some routers add noise. Values are compared in eval mode, without it."""

    def noise(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output + torch.randn_like(output) if module.training else output

    llama_model.model.embed_tokens.register_forward_hook(noise)
    assert choose(llama_model) == (True, False, None)


def test_compiled_model_is_compared_uncompiled(llama_model: Any) -> None:
    counter = CompileCounter()
    assert choose(torch.compile(llama_model, backend=counter)).shared_prefix
    assert counter.frame_count == 0


# --- ranks ---------------------------------------------------------------------------------------

RANKS = """
import os, sys
from datetime import timedelta
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from families import PAD, PROBE_ROWS, build
from spin_plugin.model import attention
from spin_plugin.model.forward import install
from spin_plugin.model.select import choose_layout

def fail(*_states):
    raise LookupError("no kernel for this card")

def gather(found):
    gathered = [None, None]
    distributed.all_gather_object(gathered, found)
    return gathered

def run(rank, failing):
    store = f"file://{sys.argv[1]}/store-{failing}"
    distributed.init_process_group("gloo", store, timedelta(seconds=120), rank=rank, world_size=2)
    if failing == rank:
        attention._by_pair = fail
    model = build("llama")
    install(model)
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in [*model.model.layers, model]:
        fully_shard(layer, mesh=mesh)
    options = {"pad_token_id": PAD, "device": torch.device("cpu"), "gather": gather}
    layout = choose_layout(model, PROBE_ROWS, requested=True, **options)
    assert all(parameter.grad is None for parameter in model.parameters())
    print(failing, rank, tuple(layout), flush=True)

for failing in (None, 1):
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if not ranks[-1]:
            code = 1
            try:
                run(rank, failing)
                code = 0
            finally:
                sys.stdout.flush()
                sys.excepthook(*sys.exc_info()) if code else None
                os._exit(code)
    for rank in ranks:
        os.waitpid(rank, 0)
"""


def test_kernel_failure_on_one_rank(tmp_path: Path) -> None:
    """Two processes shard a model with FSDP2: both decide alike and neither hangs."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    paths = f"{ROOT}:{ROOT / 'tests'}"
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith(("None", "1 ")))
    reason = "shared-prefix attention fails for LlamaForCausalLM: LookupError: no kernel for this card"
    assert lines == [
        *(f"1 {rank} {(False, False, reason)}" for rank in range(2)),
        *(f"None {rank} {(True, False, None)}" for rank in range(2)),
    ], done.stderr[-3000:]
