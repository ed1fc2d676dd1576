"""Run a generation job: start engines, hand out shards, write what they answer, try once more with less memory."""

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
SECONDS_BETWEEN_LOOKS = 1.0
LESS_MEMORY = "half as many sequences at a time, and less memory for them"


class AdapterNotServedError(SpinError):
    """vLLM knows no LoRA for this architecture or these modules; it can draw from the merged model."""


Origins = dict[int, tuple[str, int]]
"""Split and example of every wanted request, by its number. The prompts themselves stay on disk."""


def generate(
    job: Job,
    shards: Shards,
    requests: Callable[[], Iterable[Request]],
    find_python: Callable[[], Path],
    *,
    engines: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
) -> None:
    """Draw the responses of a job that are not on disk yet.

    Args:
        job: the manifest.
        shards: where the responses go; shards of the same job are kept.
        requests: gives all requests of the job, in the order of their numbers.
        find_python: names vLLM's interpreter; asked only when there is something to draw.
        engines: how many copies of the model draw side by side; None: as many as the visible GPUs hold.
        ray: let one worker hand the shards to Ray, which then starts the engines.
        ray_address: an existing cluster's; None: Ray on this machine.

    Raises:
        AdapterNotServedError: vLLM cannot serve the job's adapter.
        SpinError: there is no vLLM, or it died, twice where that can help; names the cause from its log.
    """
    shards.prepare(job)
    missing = set(shards.missing(job))
    if not missing:
        return
    python = find_python()
    shards.note(**job.manifest())  # the same responses may come from another place now
    gpus_each = job.engine.get("tensor_parallel_size", 1) * job.engine.get("pipeline_parallel_size", 1)
    where = [Placement()] if ray else placements(engines, gpus_each)[: len(missing)]
    cluster = {"ray_address": ray_address, "actors": engines} if ray else None
    for log in shards.logs():  # the error of an earlier attempt is not this one's
        log.unlink()
    wanted = (asked for asked in scored(requests()) if asked[0].number // SHARD in missing)
    title = f"iteration {job.iteration}: drawing responses"
    with _request_files(shards, wanted) as origins, Progress(len(origins), title) as progress:
        dispatcher = _Dispatcher(shards, origins, progress)
        for less_memory in (False, True):
            with _engines(python, job, shards, where, cluster, less_memory=less_memory) as (started, inbox):
                last = dispatcher.run(started, inbox)
            if last is None:
                break
            stopped = f"vLLM stopped after {progress.done:,} of {progress.total:,} responses: {last.diagnosis()}"
            if last.adapter_not_served:
                raise AdapterNotServedError(last.diagnosis())
            if less_memory or not last.may_fit_with_less_memory:
                raise SpinError(f"{stopped} (finished shards are kept: run the same command again)")
            warn(f"{stopped}; trying the rest once more with less memory ({LESS_MEMORY})")
        generated = {"responses": progress.done, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
    shards.note(generated=generated)


@contextmanager
def _request_files(shards: Shards, requests: Iterable[tuple[Request, bool]]) -> Iterator[Origins]:
    """The wanted requests, and which are scored, as one file for each shard, until the shard is written."""
    origins: Origins = {}
    try:
        shutil.rmtree(shards.requests, ignore_errors=True)
        shards.requests.mkdir()
        for shard, group in groupby(requests, lambda asked: asked[0].number // SHARD):
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
    where: list[Placement],
    cluster: dict[str, Any] | None,
    *,
    less_memory: bool,
) -> Iterator[tuple[list[Engine], Inbox]]:
    """A worker at each place; all of them, and their children, are ended on the way out, and their memory is free."""
    inbox, started = Inbox(), []
    with ExitStack() as waited_for, ExitStack() as killed:  # all are killed before one is waited for
        for number, place in enumerate(where):
            job_file = shards.requests / f"worker-{number}.json"
            content = {
                "engine": {key: _absolute(value) if key == "model" else value for key, value in job.engine.items()},
                "adapter": job.adapter and _absolute(job.adapter),
                "sampling": job.sampling,
                "requests": _absolute(str(shards.requests)),
                "cores": place.cores,
                "engines": len(where),
                "less_memory": less_memory,
                **(cluster or {}),
            }
            job_file.touch(mode=0o600)  # vllm_kwargs may hold a token
            job_file.write_text(json.dumps(content), encoding="utf-8")
            log = shards.log_of(number, again=less_memory)
            command = [str(python), str(RAY_WORKER if cluster else WORKER), str(job_file)]
            started.append(Engine(command, log, place.environment, inbox))
            waited_for.callback(started[-1].end)
            killed.callback(started[-1].kill)
        yield started, inbox


def _absolute(place: str) -> str:
    """The same place for a process that works elsewhere (an actor of a Ray cluster); a name on the hub as it is."""
    return str(Path(place).absolute()) if Path(place).exists() else place


class _Dispatcher:
    """The shards of a job on their way from the engines to the disk."""

    def __init__(self, shards: Shards, origins: Origins, progress: Progress) -> None:
        self.shards, self.origins, self.progress = shards, origins, progress
        self.sizes = Counter(number // SHARD for number in origins)
        """Requests of every shard that is not written yet."""
        self.waiting: deque[int] = deque()
        """Shards that no engine has."""
        self.answers: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        """The responses of unfinished shards; they stay when an engine dies."""
        self.living: set[Engine] = set()

    def run(self, engines: list[Engine], inbox: Inbox) -> Engine | None:
        """Go on until every shard is written (None) or no engine is left (the one that died last)."""
        self.living, self.waiting = set(engines), deque(sorted(self.sizes))
        looked, engine = time.monotonic(), None
        while self.sizes:
            if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                for living in self.living:
                    living.kill_if_hung()
            try:
                engine, answer = inbox.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                continue
            if answer is not None:
                self._receive(engine, answer)
            elif self._on_exit(engine):
                return engine
        return None

    def _receive(self, engine: Engine, answer: dict[str, Any]) -> None:
        """One line of an engine."""
        engine.heartbeat()
        if "number" in answer:
            self._store(engine, answer)
        elif "ready" in answer:
            engine.set_ready(answer["slots"])
            self.progress.start()
        elif "vllm" in answer:
            self.shards.note(vllm=answer["vllm"])
        self._submit(engine)

    def _store(self, engine: Engine, answer: dict[str, Any]) -> None:
        """One response; writes its shard when that is complete."""
        number, shard = answer["number"], answer["number"] // SHARD
        engine.in_flight -= 1
        self.progress.start()  # Ray says nothing before
        drawn = self.answers[shard]
        if shard not in self.sizes or number in drawn:  # it was answered before another engine died
            return
        split, example = self.origins[number]
        drawn[number] = {"split": split, "example": example} | {
            key: answer[key] for key in ("tokens", "finish", "stop")
        }
        if answer.get("logps") is not None:
            drawn[number]["logps"] = answer["logps"]
        self.progress.advance(len(answer["tokens"]))
        if len(drawn) == self.sizes[shard]:
            self.shards.write(shard, (drawn[key] for key in sorted(drawn)))
            self.shards.request_file(shard).unlink()
            del self.sizes[shard], self.answers[shard]
            for each in self.living:
                each.shards.discard(shard)

    def _submit(self, engine: Engine) -> None:
        """Hand an engine shards: a full batch and one more shard, so that it never runs dry, but not more than its
        share of what is left, so that the others have work to the end."""
        share = -(-len(self.sizes) // len(self.living))
        while self.waiting and engine.in_flight < engine.slots + SHARD and len(engine.shards) < share:
            if not engine.ready:
                return
            shard = self.waiting.popleft()
            engine.submit(shard, self.shards.request_file(shard), self.sizes[shard])

    def _on_exit(self, engine: Engine) -> bool:
        """An engine is dead: hand its shards to the others. Whether no engine is left."""
        self.living.remove(engine)
        self.waiting.extendleft(sorted(engine.shards & self.sizes.keys(), reverse=True))
        at_work = [living for living in self.living if living.ready]
        if self.living and (at_work or engine.ready):  # else what keeps one from starting will keep them all
            warn(f"an engine stopped, {len(self.living)} go on with its responses: {engine.diagnosis()}")
        for living in at_work:
            self._submit(living)
        return not self.living
