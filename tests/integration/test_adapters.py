"""Adapters: the opponent is the same whether merged or served by vLLM, and never the bare base model."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_pipeline import logged
from tiny import LORA, make_model, spin_config, write_config
from transformers import AutoModelForCausalLM

from spin_plugin.config.specs import read_opponent
from spin_plugin.console import SpinError
from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.shards import Shards
from spin_plugin.opponent.agreement import EXACT, comparable, distance, require_agreement
from spin_plugin.opponent.merge import merge, vllm_can_serve
from spin_plugin.run.directory import RunDir
from spin_plugin.training.prepare import open_pairs

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 64}},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}


def make_adapter(model: Path, path: Path, **kind: Any) -> Path:
    """Save a random adapter with a large effect on the base model."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    kind = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | kind
    config = LoraConfig(r=4, init_lora_weights=False, **kind)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(path)
    return path


def merged(model: Path, adapter: Path, target: Path) -> Path:
    cfg = DictDefault(base_model=str(model), load_in_4bit=False, trust_remote_code=False, revision_of_model=None)
    merge(read_opponent(cfg), adapter, target)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_base_plus_adapter(tmp_path: Path, llama: Path, kind: str) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", **KINDS[kind])
    assert vllm_can_serve(adapter) == (kind in ("lora", "rslora"))
    full = AutoModelForCausalLM.from_pretrained(merged(llama, adapter, tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(llama)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        unadapted = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, adapter)(tokens).logits
        torch.testing.assert_close(full(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - unadapted).abs().max() > 0.1


@pytest.mark.parametrize(
    "kind",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_merge_that_loses_a_tensor_is_refused(tmp_path: Path, kind: dict[str, Any]) -> None:
    """A tied head has no tensor of its own to merge into."""
    model = make_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = make_adapter(model, tmp_path / "adapter", **kind)
    with pytest.raises(SpinError, match="cannot be merged"):
        merged(model, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.slow
def test_greedy_responses_are_equal_for_adapter_and_merged_model(
    tmp_path: Path, llama: Path, vllm_python: Path
) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    full = merged(llama, adapter, tmp_path / "merged")
    requests = [Request(n, "train", n, [257, *(10 + int(digit) for digit in f"{n:03d}")], 24, n) for n in range(64)]
    generated = {}
    for name, model, lora in (("adapter", llama, str(adapter)), ("merged", full, None), ("base", llama, None)):
        engine = {"model": str(model), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64}
        engine |= {"generation_config": "vllm", "kv_cache_memory_bytes": 64 << 20}
        sampling = {"temperature": 0.0, "top_p": 1.0, "stop_token_ids": [258]}
        job, shards = Job(0, engine, lora, name, sampling, len(requests), name), Shards(tmp_path / f"generated-{name}")
        generate(job, shards, lambda: requests, lambda: vllm_python)
        generated[name] = [response["tokens"] for response in shards.responses()]
    assert generated["adapter"] == generated["merged"]
    assert generated["adapter"] != generated["base"], "a wrong opponent would be detected"


MERGE = LORA | {"spin": {"adapter_chain": "merge"}}
GPT2 = LORA | {"lora_target_linear": None, "lora_target_modules": ["c_attn", "c_fc"], "lora_fan_in_fan_out": True}
# Changes to the configuration, iterations, and whether vLLM serves the adapter unmerged.
CHAINS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "full": ({}, 3, False),
    "continue": (LORA | {"lora_dropout": 0.1}, 3, True),
    "merge": (MERGE, 3, False),
    # adapters that vLLM cannot serve: detected beforehand, or when vLLM refuses them
    "tied": (LORA | {"lora_modules_to_save": ["lm_head", "embed_tokens"]}, 2, False),
    "dora": (LORA | {"peft_use_dora": True, "lora_modules_to_save": ["lm_head"]}, 2, False),
    "gpt2": (GPT2, 2, False),
    # quantized in training, not in vLLM
    "8bit": (LORA | {"load_in_8bit": True}, 2, True),
    "4bit-merge": (MERGE | {"adapter": "qlora", "load_in_4bit": True}, 2, False),
}


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, chat_data: Path, run_jobs: Callable[..., None]) -> Path:
    """A directory with a run of each chain."""
    directory, jobs = tmp_path_factory.mktemp("chains"), []
    for name, (changes, iterations, _) in CHAINS.items():
        own = directory / name
        small = {"intermediate_size": 128, "tie_word_embeddings": name == "tied"}
        model = make_model(own / "model", "gpt2" if name == "gpt2" else "llama", **small)
        config = spin_config(own, model, chat_data, learning_rate=1e-2)
        spin = config["spin"] | {"iterations": iterations} | changes.get("spin", {})
        changed = {key: value for key, value in (config | changes | {"spin": spin}).items() if value is not None}
        jobs += iterations * [(write_config(own, changed), 1)]
    run_jobs(*jobs)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_policy_equals_the_opponent_at_the_start_of_every_iteration(chains: Path, name: str) -> None:
    """Nearly exact except in 8 bits, where LLM.int8's outliers depend on the rest of the batch."""
    exact = 1e-6 if name != "8bit" else 5e-3
    run, iterations = RunDir(chains / name / "run"), CHAINS[name][1]
    assert run.finished() == iterations
    for number in range(iterations):
        first = logged(run.root, number)[0]
        assert first["spin/loss"] == pytest.approx(math.log(2), abs=exact)
        assert first["spin/reward_margin"] == pytest.approx(0, abs=2 * exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_opponent_is_the_model_of_the_previous_iteration(chains: Path, tmp_path: Path, name: str) -> None:
    """Its stored log-probs are those of the full model, and far from those of the run's initial model."""
    _, iterations, served = CHAINS[name]
    run, model = RunDir(chains / name / "run"), chains / name / "model"
    pairs = open_pairs(run.iteration(iterations - 1))
    job = json.loads((run.iteration(iterations - 1).synthetic / "job.json").read_text())
    assert (job["adapter"] is not None) == served
    assert not list(run.iteration(iterations - 1).path.glob("opponent-*")), "it exists only during generation"
    stored = load_file(pairs.opponent_files["train"])["logps"][0].item()
    before, merges = run.iteration(iterations - 2), name.endswith("merge")
    full = before.path if name == "full" else before.merged
    if not (merges or name == "full"):
        full = merged(model, before.path, tmp_path / "full")
    expected, wrong = (token_logps(each, pairs.train[0], "real").sum().item() for each in (full, model))
    quantized = name.startswith(("4bit", "8bit"))
    assert stored == pytest.approx(expected, abs=abs(wrong - expected) / 4 if quantized else 1e-3)
    assert abs(stored - wrong) > 0.1, "a wrong opponent would be detected"


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_vllm_generates_from_the_opponent(chains: Path, name: str) -> None:
    """vLLM and the policy agree on the responses' log-probs, as every iteration reports; the run's initial model does
    not."""
    _, iterations, _ = CHAINS[name]
    last, quantized = iterations - 1, "bit" in name
    directory, model = RunDir(chains / name / "run").iteration(last), chains / name / "model"
    log = (chains / name / "rank-0.log").read_text()
    reported = re.findall(r"iteration (\d): vLLM and the policy are (\S+) nats", log)
    assert [int(number) for number, _ in reported] == list(range(iterations))
    assert all(float(apart) < (EXACT if not quantized else 0.5) for _, apart in reported)
    train = open_pairs(directory).train
    pairs, generated = comparable(Shards(directory.synthetic).responses(), train, last)
    assert len(pairs) == list(train["iteration"]).count(last) > 20, "empty responses make no pairs"
    wrong = distance(generated[:8], [token_logps(model, pair, "synthetic") for pair in pairs[:8]])
    assert wrong is not None
    assert wrong.mean > 10 * EXACT
    with pytest.raises(SpinError, match="generated by another model"):
        require_agreement(wrong, last, exact=True, quantized=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["continue", "merge"])
def test_merge_lora_takes_the_last_iteration(
    chains: Path, tmp_path: Path, run_jobs: Callable[..., None], name: str
) -> None:
    run, last = RunDir(chains / name / "run"), CHAINS[name][1] - 1
    run_jobs((chains / name / "config.yml", 1), command="merge_lora")
    base = run.iteration(last - 1).merged if name == "merge" else chains / name / "model"
    expected = merged(base, run.iteration(last).path, tmp_path / "expected")
    found = load_file(run.root / "merged/model.safetensors")
    for key, tensor in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(found[key], tensor)


def token_logps(model: Path, pair: dict[str, Any], side: str) -> torch.Tensor:
    """Return the log-probs of a response's tokens."""
    tokens = torch.tensor([pair["prompt"] + pair[side]])
    positions = range(len(pair["prompt"]) - 1, tokens.shape[1] - 1)
    with torch.no_grad():
        logps = AutoModelForCausalLM.from_pretrained(model)(tokens).logits.log_softmax(-1)[0]
    return torch.stack([logps[place, tokens[0, place + 1]] for place in positions])
