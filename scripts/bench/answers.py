"""Answer prompts with vLLM, greedily and by sampling; run by vLLM's interpreter.

    .venv-vllm/bin/python scripts/bench/answers.py MODEL PROMPTS.json ANSWERS.json --samples 4

PROMPTS.json holds a list of prompts as token ids; ANSWERS.json one list per prompt: the greedy answer, then the
samples, as token ids without the stop token.
"""

import argparse
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--stop", type=int, required=True, help="the token that ends an answer")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gpu-share", type=float, default=0.5)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}  # before vllm is imported

    import vllm
    from vllm.platforms import current_platform

    gpu = {} if current_platform.is_cpu() else {"gpu_memory_utilization": options.gpu_share}
    engine = vllm.LLM(
        options.model,
        dtype=options.dtype,
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=1 << 30,
        enable_chunked_prefill=False,
        **gpu,
    )
    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    requests, parameters = [], []
    for number, prompt in enumerate(prompts):
        for sample in range(1 + options.samples):
            requests.append(vllm.TokensPrompt(prompt_token_ids=prompt))
            parameters.append(
                vllm.SamplingParams(
                    temperature=float(sample > 0),
                    max_tokens=options.max_tokens,
                    stop_token_ids=[options.stop],
                    seed=(options.seed * 1000 + sample) * 100_000 + number,
                    detokenize=False,
                )
            )
    outputs = engine.generate(requests, parameters, use_tqdm=False)
    found = [[token for token in output.outputs[0].token_ids if token != options.stop] for output in outputs]
    each = 1 + options.samples
    grouped = [found[first : first + each] for first in range(0, len(found), each)]
    options.answers.write_text(json.dumps(grouped), encoding="utf-8")


if __name__ == "__main__":
    main()
