"""Run a generation job: start engines, submit shards, write their responses, retry once with less memory."""

import json
import shutil
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from queue import Empty
from typing import Any

from spin_plugin.console import SpinError, warn
from spin_plugin.generation.devices import Placement, placements
from spin_plugin.generation.engine import Engine, Inbox
from spin_plugin.generation.job import SHARD, Job, Request, scored
from spin_plugin.generation.progress import Progress
from spin_plugin.generation.shards import Shards

WORKER = Path(__file__).with_name("vllm_worker.py")
RAY_WORKER = Path(__file__).with_name("ray_worker.py")
POLL_INTERVAL = 1.0  # seconds
LESS_MEMORY = "half as many sequences at a time, a smaller cache"


class AdapterNotServedError(SpinError):
    """vLLM cannot serve the adapter with this architecture or these target modules; merge it into the base model."""


Origins = dict[int, tuple[str, int]]
"""Split and example of each missing request, by number. The prompts stay on disk."""


def generate(
    job: Job,
    shards: Shards,
    requests: Callable[[], Iterable[Request]],
    find_python: Callable[[], Path],
    *,
    engines: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
    on_shard: Callable[[int], None] | None = None,
) -> None:
    """Generate the responses of a job that are not on disk yet.

    Args:
        job: the job.
        shards: where responses are written; intact shards of the same job are kept.
        requests: returns all requests of the job, ordered by number.
        find_python: returns vLLM's interpreter; called only if responses are missing.
        engines: number of data-parallel engines; None: as many as fit the visible GPUs.
        ray: start one worker that submits the shards to Ray, which starts the engines.
        ray_address: address of an existing cluster; None: start Ray on this machine.
        on_shard: called with the number of each shard once it is written.

    Raises:
        AdapterNotServedError: vLLM cannot serve the job's adapter.
        SpinError: vLLM is missing, or it exited and the retry did not help; the message holds its exit diagnosis.
    """
    shards.prepare(job)
    missing = set(shards.missing(job))
    if not missing:
        return
    python = find_python()
    shards.update_manifest(**job.manifest())  # paths and engine arguments may have changed
    gpus_each = job.engine.get("tensor_parallel_size", 1) * job.engine.get("pipeline_parallel_size", 1)
    placed = [Placement()] if ray else placements(engines, gpus_each)[: len(missing)]
    cluster = {"ray_address": ray_address, "actors": engines} if ray else None
    for log in shards.logs():  # of an earlier attempt, whose errors are not this one's
        log.unlink()
    to_generate = ((r, score) for r, score in scored(requests()) if r.number // SHARD in missing)
    title = f"iteration {job.iteration}: generating responses"
    with _request_files(shards, to_generate) as origins, Progress(len(origins), title) as progress:
        dispatcher = _Dispatcher(shards, origins, progress, on_shard)
        for less_memory in (False, True):
            with _engines(python, job, shards, placed, cluster, less_memory=less_memory) as (started, inbox):
                exited = dispatcher.run(started, inbox)
            if exited is None:
                break
            stopped = f"vLLM stopped after {progress.done:,} of {progress.total:,} responses: {exited.diagnosis()}"
            if exited.adapter_not_served:
                raise AdapterNotServedError(exited.diagnosis())
            if less_memory or not exited.may_fit_with_less_memory:
                raise SpinError(f"{stopped}; finished shards are kept, rerun the same command")
            warn(f"{stopped}; generating the rest once more with less memory ({LESS_MEMORY})")
        generated = {"responses": progress.done, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
    shards.update_manifest(generated=generated)


@contextmanager
def _request_files(shards: Shards, requests: Iterable[tuple[Request, bool]]) -> Iterator[Origins]:
    """Write one file of requests per shard; all are removed on exit."""
    origins: Origins = {}
    try:
        shutil.rmtree(shards.requests, ignore_errors=True)
        shards.requests.mkdir()
        for shard, group in groupby(requests, lambda pair: pair[0].number // SHARD):
            with open(shards.request_file(shard), "w", encoding="utf-8") as file:
                for r, score in group:
                    origins[r.number] = (r.split, r.example)
                    line = {"number": r.number, "prompt": r.prompt, "max_tokens": r.max_tokens, "seed": r.seed}
                    file.write(json.dumps(line | {"score": score}) + "\n")
        yield origins
    finally:
        shutil.rmtree(shards.requests, ignore_errors=True)


@contextmanager
def _engines(
    python: Path,
    job: Job,
    shards: Shards,
    placed: list[Placement],
    cluster: dict[str, Any] | None,
    *,
    less_memory: bool,
) -> Iterator[tuple[list[Engine], Inbox]]:
    """Start a worker on each placement. On exit all workers and their children are killed and their memory is free."""
    inbox, started = Inbox(), []
    with ExitStack() as waits, ExitStack() as kills:  # kill all before waiting for any
        for number, placement in enumerate(placed):
            job_file = shards.requests / f"worker-{number}.json"
            content = {
                "engine": {key: _absolute(value) if key == "model" else value for key, value in job.engine.items()},
                "adapter": job.adapter and _absolute(job.adapter),
                "sampling": job.sampling,
                "requests": _absolute(str(shards.requests)),
                "cores": placement.cores,
                "engines": len(placed),
                "less_memory": less_memory,
                **(cluster or {}),
            }
            job_file.touch(mode=0o600)  # vllm_kwargs may hold a token
            job_file.write_text(json.dumps(content), encoding="utf-8")
            log = shards.log_of(number, retry=less_memory)
            command = [str(python), str(RAY_WORKER if cluster else WORKER), str(job_file)]
            started.append(Engine(command, log, placement.environment, inbox))
            waits.callback(started[-1].end)
            kills.callback(started[-1].kill)
        yield started, inbox


def _absolute(path: str) -> str:
    """Return an absolute path, because Ray's actors have another working directory; a name on the hub is unchanged."""
    return str(Path(path).absolute()) if Path(path).exists() else path


class _Dispatcher:
    """Submit the shards of a job to engines and write their responses."""

    def __init__(
        self, shards: Shards, origins: Origins, progress: Progress, on_shard: Callable[[int], None] | None = None
    ) -> None:
        self.shards, self.origins, self.progress, self.on_shard = shards, origins, progress, on_shard
        self.sizes = Counter(number // SHARD for number in origins)
        """Number of requests of each shard that is not written yet."""
        self.waiting: deque[int] = deque()
        """Shards that are not submitted."""
        self.responses: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        """Responses of unfinished shards, by number; kept when an engine exits."""
        self.running: set[Engine] = set()

    def run(self, engines: list[Engine], inbox: Inbox) -> Engine | None:
        """Return None once every shard is written, or the last engine if all have exited."""
        self.running, self.waiting = set(engines), deque(sorted(self.sizes))
        last_check, engine = time.monotonic(), None
        while self.sizes:
            if time.monotonic() - last_check > POLL_INTERVAL:
                last_check = time.monotonic()
                for running in self.running:
                    running.kill_if_hung()
            try:
                engine, message = inbox.get(timeout=POLL_INTERVAL)
            except Empty:
                continue
            if message is not None:
                self._receive(engine, message)
            elif self._on_exit(engine):
                return engine
        return None

    def _receive(self, engine: Engine, message: dict[str, Any]) -> None:
        """Handle one message of an engine."""
        engine.heartbeat()
        if "number" in message:
            self._store(engine, message)
        elif "ready" in message:
            engine.set_ready(message["slots"])
            self.progress.start()
        elif "vllm" in message:
            self.shards.update_manifest(vllm=message["vllm"])
        self._submit(engine)

    def _store(self, engine: Engine, message: dict[str, Any]) -> None:
        """Store one response, and write its shard if that completes it."""
        number, shard = message["number"], message["number"] // SHARD
        engine.in_flight -= 1
        self.progress.start()  # the Ray worker sends no "ready"
        responses = self.responses[shard]
        if shard not in self.sizes or number in responses:  # already answered by an engine that exited
            return
        split, example = self.origins[number]
        responses[number] = {"split": split, "example": example} | {
            key: message[key] for key in ("tokens", "finish", "stop")
        }
        if message.get("logps") is not None:
            responses[number]["logps"] = message["logps"]
        self.progress.advance(len(message["tokens"]))
        if len(responses) == self.sizes[shard]:
            self.shards.write(shard, (responses[key] for key in sorted(responses)))
            self.shards.request_file(shard).unlink()
            del self.sizes[shard], self.responses[shard]
            for running in self.running:
                running.shards.discard(shard)
            if self.on_shard:
                self.on_shard(shard)

    def _submit(self, engine: Engine) -> None:
        """Submit shards to an engine: its slots plus one shard, so that it never idles, but at most an equal share of
        the remaining shards, so that all engines finish together."""
        share = -(-len(self.sizes) // len(self.running))
        while self.waiting and engine.in_flight < engine.slots + SHARD and len(engine.shards) < share:
            if not engine.ready:
                return
            shard = self.waiting.popleft()
            engine.submit(shard, self.shards.request_file(shard), self.sizes[shard])

    def _on_exit(self, engine: Engine) -> bool:
        """Requeue the shards of an engine that exited; return whether no engine is left."""
        self.running.remove(engine)
        self.waiting.extendleft(sorted(engine.shards & self.sizes.keys(), reverse=True))
        ready = [running for running in self.running if running.ready]
        if self.running and (ready or engine.ready):  # else none became ready, and all may fail alike
            warn(f"an engine stopped, {len(self.running)} left to generate its responses: {engine.diagnosis()}")
        for running in ready:
            self._submit(running)
        return not self.running
