"""Run a generation job: start vLLM's interpreter, show progress, write shards, name the cause of a failure."""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from spin_plugin.generation.job import SHARD, Job, Request
from spin_plugin.generation.progress import Progress
from spin_plugin.generation.shards import Shards
from spin_plugin.messages import SpinError
from spin_plugin.run import SECRET_PARTS

WORKER = Path(__file__).with_name("vllm_worker.py")
# Set by torchrun and accelerate for training; vLLM would take them for its own.
TRAINING_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME",
)  # fmt: skip
TRAINING_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
ADVICE = {
    "out of memory": "lower spin.generation.gpu_memory_utilization or spin.generation.max_model_len",
    "No available memory for the cache": "raise spin.generation.gpu_memory_utilization, or lower max_model_len",
    "max seq len": "lower spin.generation.max_model_len or raise gpu_memory_utilization",
    "Free memory on device": "free the GPU or lower spin.generation.gpu_memory_utilization",
}


def generate(
    job: Job, shards: Shards, requests: Callable[[], Iterable[Request]], find_python: Callable[[], Path]
) -> None:
    """Draw the responses of a job that are not on disk yet.

    Args:
        job: the manifest.
        shards: where the responses go; shards of the same job are kept.
        requests: gives all requests of the job, in the order of their numbers.
        find_python: names vLLM's interpreter; asked only when there is something to draw.

    Raises:
        SpinError: there is no vLLM, or vLLM died; names the cause from its log.
    """
    shards.prepare(job)
    missing = set(shards.missing(job))
    if not missing:
        return
    python = find_python()
    wanted = (request for request in requests() if request.number // SHARD in missing)
    with (
        _request_file(shards, wanted) as (request_file, origins),
        _worker(python, job, shards, request_file) as (answers, process),
    ):
        received = _collect(answers, job, shards, origins)
    if received < len(origins):
        cause = cause_of_death(shards.log, process.returncode)
        raise SpinError(
            f"vLLM stopped after {received:,} of {len(origins):,} responses: {cause} "
            "(finished shards are kept: run the same command again)"
        )


Worker = subprocess.Popen[bytes]
Origins = dict[int, tuple[str, int]]
"""Split and example of every wanted request, by its number. The prompts themselves stay on disk."""


@contextmanager
def _request_file(shards: Shards, requests: Iterable[Request]) -> Iterator[tuple[Path, Origins]]:
    """The wanted requests as a file for the worker, for as long as it works."""
    path, origins = shards.folder / "requests.jsonl", {}
    try:
        with open(path, "w", encoding="utf-8") as file:
            for r in requests:
                origins[r.number] = (r.split, r.example)
                line = {"number": r.number, "prompt": r.prompt, "max_tokens": r.max_tokens, "seed": r.seed}
                file.write(json.dumps(line) + "\n")
        yield path, origins
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _worker(python: Path, job: Job, shards: Shards, request_file: Path) -> Iterator[tuple[IO[str], Worker]]:
    """Start the worker in a session of its own and give its answers; end it, and all its children, on the way out."""
    job_file = shards.folder / "worker.json"
    content = {"engine": job.engine, "adapter": job.adapter, "sampling": job.sampling, "requests": str(request_file)}
    job_file.touch(mode=0o600)  # generation.vllm may hold a token
    job_file.write_text(json.dumps(content), encoding="utf-8")
    receiving, sending = os.pipe()
    # A new log for every attempt: the error of an earlier one is not this one's.
    with open(shards.log, "w", encoding="utf-8") as log, open(receiving, encoding="utf-8") as answers:
        process = subprocess.Popen(
            [str(python), str(WORKER), str(job_file), str(sending)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[sending],
            env=_environment(),
            start_new_session=True,
        )
        os.close(sending)
        # vLLM forks its engine, which holds the pipe open: where the worker dies alone, end what it left.
        threading.Thread(target=_end, args=(process,), kwargs={"wait_first": True}, daemon=True).start()
        try:
            yield answers, process
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)  # its last words go to the log
        finally:
            _end(process)
            job_file.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    """The worker's environment: ours without what belongs to training, and without secrets."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in TRAINING_VARIABLES
        and not key.startswith(TRAINING_PREFIXES)
        and (key.startswith(("HF_", "HUGGING_FACE_HUB_")) or not any(part in key.lower() for part in SECRET_PARTS))
    }


def _end(process: Worker, *, wait_first: bool = False) -> None:
    """End the worker's whole process group; vLLM's engine would outlive the worker alone."""
    if wait_first:
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _collect(answers: IO[str], job: Job, shards: Shards, origins: Origins) -> int:
    """Read answers until the worker ends; write every shard as soon as it is complete. Returns how many came."""
    open_shards: dict[int, dict[int, dict[str, Any]]] = {}
    sizes = {n: min(SHARD, job.requests - n * SHARD) for n in {number // SHARD for number in origins}}
    received = 0
    with Progress(len(origins), f"iteration {job.iteration}: drawing responses") as progress:
        for line in answers:
            if not line.endswith("\n"):  # the worker was killed in the middle of an answer
                break
            answer = json.loads(line)
            if "vllm" in answer:
                shards.note(vllm=answer["vllm"])
            elif "ready" in answer:
                progress.start()
            else:
                received += 1
                progress.advance(len(answer["tokens"]))
                number = answer["number"] // SHARD
                shard = open_shards.setdefault(number, {})
                shard[answer["number"]] = _response(*origins[answer["number"]], answer)
                if len(shard) == sizes[number]:
                    shards.write(number, (shard[key] for key in sorted(shard)))
                    del open_shards[number]
        drawn = {"responses": received, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
    shards.note(drawn=drawn)
    return received


def _response(split: str, example: int, answer: dict[str, Any]) -> dict[str, Any]:
    """What is stored of one response."""
    return {
        "split": split,
        "example": example,
        "tokens": answer["tokens"],
        "finish": answer["finish"],
        "stop": answer["stop"],
    }


def cause_of_death(log: Path, returncode: int | None = None) -> str:
    """Why vLLM died, from its log or its exit status, and what to do about it where that is known."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    lines = [re.sub(r"^\(.*?\)\s*(?:[A-Z]+ [\d-]+ [\d:]+ \[.*?\]\s*)?", "", line) for line in lines[-400:]]
    raised = [
        place for place, line in enumerate(lines) if re.match(r"[\w.]*(?:Error|Exception|Exit|Interrupt)\b", line)
    ]
    # An engine process reports its error first; the parent's "see root cause above" comes after it.
    telling = [place for place in raised if "root cause" not in lines[place].lower()]
    cause = lines[(telling or raised)[-1]] if raised else (lines or ["it printed nothing"])[-1]
    if returncode is not None and returncode < 0 and not raised:
        cause = f"it was killed by signal {-returncode} ({signal.strsignal(-returncode)}; out of memory?)"
    elif "validation error" in cause:  # pydantic gives the reason in the next line
        cause = " ".join(lines[telling[-1] : telling[-1] + 2])
    advice = next((text for sign, text in ADVICE.items() if sign.lower() in cause.lower()), None)
    return f"{cause[:300]}; {f'{advice}; ' if advice else ''}its log is {log}"
