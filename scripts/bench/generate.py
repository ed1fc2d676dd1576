"""Compare our generation, including writing the shards, with one bare `LLM.generate`.

    python scripts/bench/generate.py [--rounds 3] [--prompts 1024] [--unseeded] [--model DIRECTORY] [--json FILE]

Both sides run in vLLM's own interpreter with the same engine arguments, prompts, token budgets and seeds, timed from
when the engine is ready. Rounds alternate; medians are printed. `--unseeded` adds the bare side without per-request
seeds, to measure their cost. The model runs in bf16 on a GPU, in fp32 on a CPU; the default one is too small for a
meaningful GPU result, so pass a larger one with `--model`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.python import vllm_python
from spin_plugin.generation.shards import Shards

BARE = """
import json, os, sys, time
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") if sys.argv[2] == "cpu" else None
import vllm
job = json.load(open(sys.argv[1]))
llm = vllm.LLM(**job["engine"])
prompts = [vllm.TokensPrompt(prompt_token_ids=request["prompt"]) for request in job["requests"]]
sampling = [
    vllm.SamplingParams(**job["sampling"], max_tokens=request["max_tokens"], seed=request["seed"], detokenize=False)
    for request in job["requests"]
]
started = time.monotonic()
outputs = llm.generate(prompts, sampling, use_tqdm=False)
seconds = time.monotonic() - started
tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
with open(sys.argv[3], "w") as result:
    json.dump({"tokens": tokens, "seconds": seconds}, result)
os._exit(0)
"""


def make_model(directory: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=2, **small)).save_pretrained(directory)


def make_requests(count: int) -> list[Request]:
    """Prompts and budgets of log-normal length; the random model uses its full budget."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(np.log(60), 0.6, count).astype(int), 4, 256)
    budgets = np.clip(rng.lognormal(np.log(60), 0.6, count).astype(int), 4, 256)
    return [
        Request(number, "train", number, rng.integers(3, 8000, prompt).tolist(), int(budget), number)
        for number, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]


def engine_arguments(model: Path) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for both sides."""
    engine = {"model": str(model), "skip_tokenizer_init": True, "generation_config": "vllm"}
    engine |= {"max_model_len": 512, "seed": 0}
    if torch.cuda.is_available():
        return engine | {"dtype": "bfloat16"}
    cpu = {"dtype": "float32", "enforce_eager": True}
    return engine | cpu | {"kv_cache_memory_bytes": 512 << 20, "enable_chunked_prefill": False}


def ours(directory: Path, job: Job, requests: list[Request]) -> float:
    """Return tokens/s of our dispatcher and worker."""
    shards = Shards(directory / "synthetic")
    shutil.rmtree(shards.directory, ignore_errors=True)
    generate(job, shards, lambda: requests, lambda: vllm_python(None))
    generated = (shards.manifest() or {})["generated"]
    return generated["tokens"] / generated["seconds"]


def bare(directory: Path, job: Job, requests: list[Request], *, seeded: bool = True) -> float:
    """Return tokens/s of one `LLM.generate`."""
    script, content, result = directory / "bare.py", directory / "job.json", directory / "bare.json"
    script.write_text(BARE)
    rows = [request._asdict() | ({} if seeded else {"seed": None}) for request in requests]
    content.write_text(json.dumps({"engine": job.engine, "sampling": job.sampling, "requests": rows}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = [str(vllm_python(None)), str(script), str(content), device, str(result)]
    with open(directory / "bare.log", "w") as log:
        done = subprocess.run(command, check=False, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError((directory / "bare.log").read_text()[-2000:])
    measured = json.loads(result.read_text())
    return measured["tokens"] / measured["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--unseeded", action="store_true", help="also measure the bare side without seeds")
    parser.add_argument("--model", type=Path, help="a model with a vocabulary of at least 8,000 tokens")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    requests = make_requests(options.prompts)
    rates: dict[str, list[float]] = {side: [] for side in ("ours", "bare", "unseeded")[: 2 + options.unseeded]}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.model is None:
            make_model(directory / "model")
        engine = engine_arguments(options.model or directory / "model")
        sampling = {"temperature": 1.0, "top_p": 1.0, "stop_token_ids": [1]}
        job = Job(0, engine, None, "bench", sampling, len(requests), "bench")
        for number in range(options.rounds):
            rates["bare"].append(bare(directory, job, requests))
            rates["ours"].append(ours(directory, job, requests))
            if options.unseeded:
                rates["unseeded"].append(bare(directory, job, requests, seeded=False))
            shown = ", ".join(f"{side} {values[-1]:,.0f}" for side, values in rates.items())
            sys.stdout.write(f"round {number}: {shown} tokens/s\n")
    medians = {side: statistics.median(values) for side, values in rates.items()}
    ratios = {f"{side}_vs_bare": value / medians["bare"] for side, value in medians.items() if side != "bare"}
    summary = {"vs_bare": ratios.pop("ours_vs_bare"), **ratios, "tokens_per_second": medians, "rounds": rates}
    sys.stdout.write(f"medians: {medians}, ours / bare {summary['vs_bare']:.3f}\n")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
