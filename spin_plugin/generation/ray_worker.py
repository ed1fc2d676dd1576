"""Generate responses on a Ray cluster. Run by vLLM's interpreter; the only file that imports ray.

    PYTHON ray_worker.py JOB_FILE RESPONSES_FD

The protocol is that of vllm_worker.py, except that no `ready` is sent: Ray needs all requests in advance. JOB_FILE
therefore also holds `requests` (the directory with the request files), `ray_address` (null: start Ray on this machine)
and `actors` (null: one for each group of GPUs). Every actor of `map_batches` runs an engine and processes several files
at a time, so that the engine never idles. An actor returns the responses of a file together, and Ray requeues the files
of an actor that exits, so each request is answered once.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import vllm_worker  # from the directory of this file

POLL_INTERVAL = 5.0  # seconds
HEARTBEAT_TIMEOUT = 600.0
RESTARTS = 2
# Files of 256 requests that fill vLLM's slots on the largest GPUs, plus one.
FILES_AT_ONCE = 5


class Opponent:
    """An actor that runs one engine, shared by concurrent calls."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.request_files: SimpleQueue[str] = SimpleQueue()
        self.messages = vllm_worker.serve(job, self.request_files)
        self.vllm = next(self.messages)["vllm"]
        next(self.messages)  # ready
        self.in_flight: dict[int, Future[dict[str, Any]]] = {}
        self.last_heartbeat = time.monotonic()
        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._exit_if_hung, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the responses to the request file in `batch`, one JSON object per line."""
        (path,) = map(str, batch["path"])
        numbers = [json.loads(line)["number"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
        futures = {number: Future[dict[str, Any]]() for number in numbers}
        self.last_heartbeat = time.monotonic()
        self.in_flight.update(futures)
        self.request_files.put(path)
        responses = "\n".join(json.dumps(future.result()) for future in futures.values())
        return {"responses": [responses], "vllm": [self.vllm]}

    def _receive(self) -> None:
        try:
            for message in self.messages:
                self.last_heartbeat = time.monotonic()
                if "number" in message:
                    self.in_flight.pop(message["number"]).set_result(message)
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # Ray starts another actor

    def _exit_if_hung(self) -> None:
        while not self.in_flight or time.monotonic() - self.last_heartbeat < HEARTBEAT_TIMEOUT:
            time.sleep(POLL_INTERVAL)
        os._exit(1)


def serve(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield vLLM's version and the responses to all request files of the job."""
    import ray
    from ray.data import ActorPoolStrategy

    if job["ray_address"]:
        ray.init(address=job["ray_address"])
    else:
        ray.init(address="local", include_dashboard=False)
    ray.cloudpickle.register_pickle_by_value(vllm_worker)  # the cluster's nodes need not have this plugin
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = sorted(str(path) for path in Path(job["requests"]).glob("*.jsonl"))
    gpus_each = job["engine"].get("tensor_parallel_size", 1) * job["engine"].get("pipeline_parallel_size", 1)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = min(len(paths), job["actors"] or max(1, gpus // gpus_each))
    at_once = min(FILES_AT_ONCE, -(-len(paths) // actors))  # so that all actors finish together
    files = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    batches = files.map_batches(
        Opponent,
        batch_size=1,
        fn_constructor_args=(job | {"engines": actors},),
        compute=ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        ),
        max_restarts=RESTARTS,
        **({"num_gpus": gpus_each} if gpus else {"num_cpus": 1}),
    )
    for number, row in enumerate(batches.iter_rows()):
        if number == 0:
            yield {"vllm": row["vllm"]}
        yield from map(json.loads, row["responses"].splitlines())


if __name__ == "__main__":
    vllm_worker.main(lambda job, request_files: serve(job))
