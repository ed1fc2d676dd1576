"""Answer requests on a Ray cluster. Run by vLLM's own interpreter; the only file that imports ray.

    PYTHON ray_worker.py JOB_FILE ANSWERS_FD

It answers as vllm_worker.py does, but never says that it is ready for more: Ray wants to know everything beforehand.
JOB_FILE therefore holds `requests`, the directory with the files that are asked for, and besides `ray_address` (null: a
Ray of its own on this machine) and `actors` (null: one for each group of GPUs). Every actor of `map_batches` holds an
engine and answers several files at once, so that the engine never runs dry. An answer leaves the actor when its file is
complete, and Ray hands the files of a dead actor to another: each request is answered once.
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

SECONDS_BETWEEN_HEARTBEATS = 5.0
PATIENCE = 600.0
RESTARTS = 2
# Of 256 requests: as many as vLLM answers at a time on the largest GPUs, and one more.
FILES_AT_ONCE = 5


class Opponent:
    """An actor with an engine. Several calls at a time share it."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.orders: SimpleQueue[str] = SimpleQueue()
        self.answers = vllm_worker.answers(job, self.orders)
        self.vllm = next(self.answers)["vllm"]
        next(self.answers)  # ready
        self.asked: dict[int, Future[dict[str, Any]]] = {}
        self.alive = time.monotonic()
        threading.Thread(target=self._answer, daemon=True).start()
        threading.Thread(target=self._exit_if_hung, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The answers to the one file that `batch` names, a line each."""
        (path,) = map(str, batch["path"])
        numbers = [json.loads(line)["number"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
        answers = {number: Future[dict[str, Any]]() for number in numbers}
        self.alive = time.monotonic()
        self.asked.update(answers)
        self.orders.put(path)
        return {"answers": ["\n".join(json.dumps(answer.result()) for answer in answers.values())], "vllm": [self.vllm]}

    def _answer(self) -> None:
        try:
            for answer in self.answers:
                self.alive = time.monotonic()
                if "number" in answer:
                    self.asked.pop(answer["number"]).set_result(answer)
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # Ray starts another

    def _exit_if_hung(self) -> None:
        while not self.asked or time.monotonic() - self.alive < PATIENCE:
            time.sleep(SECONDS_BETWEEN_HEARTBEATS)
        os._exit(1)


def play(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the answers to all files of the job."""
    import ray
    from ray.data import ActorPoolStrategy

    if job["ray_address"]:
        ray.init(address=job["ray_address"])
    else:
        ray.init(address="local", include_dashboard=False)
    ray.cloudpickle.register_pickle_by_value(vllm_worker)  # the cluster's machines need not have this plugin
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = sorted(str(path) for path in Path(job["requests"]).glob("*.jsonl"))
    gpus_each = job["engine"].get("tensor_parallel_size", 1) * job["engine"].get("pipeline_parallel_size", 1)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = min(len(paths), job["actors"] or max(1, gpus // gpus_each))
    at_once = min(FILES_AT_ONCE, -(-len(paths) // actors))  # and work for all of them to the end
    files = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    answered = files.map_batches(
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
    for number, row in enumerate(answered.iter_rows()):
        if number == 0:
            yield {"vllm": row["vllm"]}
        yield from map(json.loads, row["answers"].splitlines())


if __name__ == "__main__":
    vllm_worker.main(lambda job, orders: play(job))
