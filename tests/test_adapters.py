"""Adapters: merged or served as they are, the opponent is the same; and it is never the base model alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Finished
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_pipeline import logged
from tiny import LORA, spin_config, write_config
from transformers import AutoModelForCausalLM

from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.launcher import generate
from spin_plugin.generation.shards import Shards
from spin_plugin.iteration import open_pairs
from spin_plugin.merge import merge, served_by_vllm
from spin_plugin.run import RunDir

Command = Callable[..., Finished]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}


def make_adapter(model: Path, path: Path, **kind: Any) -> Path:
    """Save a random adapter that is far from the base model."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **kind)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(path)
    return path


def merged(model: Path, adapter: Path, target: Path) -> Path:
    cfg = SimpleNamespace(base_model=str(model), load_in_4bit=False, trust_remote_code=False, revision_of_model=None)
    merge(cfg, adapter, target)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_base_plus_adapter(tmp_path: Path, llama: Path, kind: str) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", **KINDS[kind])
    assert served_by_vllm(adapter) == (kind in ("lora", "rslora"))
    whole = AutoModelForCausalLM.from_pretrained(merged(llama, adapter, tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(llama)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        alone = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, adapter)(tokens).logits
        torch.testing.assert_close(whole(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - alone).abs().max() > 0.1


@pytest.mark.slow
def test_greedy_responses_from_the_adapter_are_those_of_the_merged_model(
    tmp_path: Path, llama: Path, vllm_python: Path
) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter")
    whole = merged(llama, adapter, tmp_path / "merged")
    requests = [Request(n, "train", n, [257, *(10 + int(digit) for digit in f"{n:03d}")], 24, n) for n in range(64)]
    drawn = {}
    for name, model, lora in (("adapter", llama, str(adapter)), ("merged", whole, None), ("base", llama, None)):
        engine = {"model": str(model), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64}
        engine |= {"generation_config": "vllm", "kv_cache_memory_bytes": 64 << 20}
        sampling = {"temperature": 0.0, "top_p": 1.0, "stop_token_ids": [258]}
        job, shards = Job(0, engine, lora, name, sampling, len(requests), name), Shards(tmp_path / f"drawn-{name}")
        generate(job, shards, lambda: requests, lambda: vllm_python)
        drawn[name] = [response["tokens"] for response in shards.responses()]
    assert drawn["adapter"] == drawn["merged"]
    assert drawn["adapter"] != drawn["base"], "a wrong opponent would be seen"


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["merge", "continue"])
def test_every_iteration_starts_from_the_model_of_the_one_before(
    tmp_path: Path, llama: Path, chat_data: Path, command: Command, chain: str
) -> None:
    """`merge` with plain LoRA; `continue` with an adapter that vLLM cannot serve. The opponent's stored values are
    those of the merged model, and far from the base model's."""
    kind = {} if chain == "merge" else {"peft_use_dora": True, "lora_modules_to_save": ["lm_head"]}
    config = spin_config(tmp_path, llama, chat_data, **LORA, **kind)
    config["spin"] |= {"adapter_chain": chain}
    write_config(tmp_path, config)
    done = command(ROOT / "scripts/iterate.sh", "config.yml", folder=tmp_path)
    assert done.code == 0, done.output[-3000:]
    run = RunDir(tmp_path / "run")
    for iteration in (0, 1):
        first = logged(run.root, iteration)[0]
        assert first["spin/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["spin/reward_margin"] == pytest.approx(0, abs=1e-6)
    assert json.loads((run.iteration(1).synthetic / "job.json").read_text())["adapter"] is None
    assert not run.iteration(1).opponent.exists(), "it is there only while vLLM draws"

    pairs = open_pairs(run.iteration(1))
    stored = load_file(pairs.opponent_files["train"])["logps"][0, 0].item()
    whole = merged(llama, run.iteration(0).path, tmp_path / "opponent")
    assert stored == pytest.approx(logp(whole, pairs.train[0]), abs=1e-3)
    assert abs(stored - logp(llama, pairs.train[0])) > 0.1, "a wrong opponent would be seen"

    done = command("axolotl", "merge-lora", "config.yml", folder=tmp_path)
    assert done.code == 0, done.output[-3000:]
    base = run.iteration(0).merged if chain == "merge" else llama
    expected = merged(base, run.iteration(1).path, tmp_path / "expected")
    found = load_file(tmp_path / "run/merged/model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor)


def logp(model: Path, pair: dict[str, Any]) -> float:
    """The real response's log-probability by the model alone."""
    tokens = torch.tensor([pair["prompt"] + pair["real"]])
    asked = range(len(pair["prompt"]) - 1, tokens.shape[1] - 1)
    with torch.no_grad():
        logps = AutoModelForCausalLM.from_pretrained(model)(tokens).logits.log_softmax(-1)[0]
    return sum(logps[place, tokens[0, place + 1]].item() for place in asked)
