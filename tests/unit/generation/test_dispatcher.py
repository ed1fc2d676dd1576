"""The dispatcher with real worker processes: small scripts that implement the protocol of vllm_worker.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from spin_plugin.console import SpinError
from spin_plugin.generation import dispatcher, engine
from spin_plugin.generation.diagnosis import diagnose_exit
from spin_plugin.generation.dispatcher import generate
from spin_plugin.generation.job import SCORED, SHARD, Job, Request, scored
from spin_plugin.generation.shards import Shards

TOTAL = 2 * SHARD + 88  # two full shards and a short one
JOB = Job(
    iteration=2,
    engine={"model": "iteration-1", "dtype": "float32"},
    adapter=None,
    weights="abc",
    sampling={"temperature": 1.0, "stop_token_ids": [2]},
    requests=TOTAL,
    requests_sha256="def",
)
REQUESTS = [
    Request(n, "train" if n < TOTAL - 10 else "eval", 1000 + n, [n, n + 1], 8 + n % 3, seed=7 * n) for n in range(TOTAL)
]

# The beginning of every worker script below; `directory` is the test's.
WORKER = """
import json, os, signal, subprocess, sys
from pathlib import Path

directory = Path({directory!r})
job = json.loads(Path(sys.argv[1]).read_text())
os.set_inheritable(int(sys.argv[2]), False)
out = open(int(sys.argv[2]), "w", buffering=1)
requests = [json.loads(line) for file in sorted(Path(job["requests"]).glob("*.jsonl")) for line in open(file)]
retry = job["less_memory"]
number = int(Path(sys.argv[1]).stem.rpartition("-")[2])

def send(**content):
    out.write(json.dumps(content) + "\\n")

def answer(request):
    finish = "length" if request["number"] % 2 else "stop"
    send(number=request["number"], tokens=[request["seed"], *request["prompt"], 2], finish=finish, stop=2)

def submitted_shards():
    # yields the requests of each submitted shard; the launcher kills this process
    for path in sys.stdin:
        yield [json.loads(line) for line in open(path.strip())]

def ready():
    send(ready=True, slots=1 << 20)

def serve():
    ready()
    for shard in submitted_shards():
        for request in shard:
            answer(request)

(directory / f"worker-{{number}}{{retry}}.pid").write_text(str(os.getpid()))
(directory / "requests").write_text(json.dumps(requests))
print("tiny worker started", flush=True)
send(vllm="0.0.tiny")
"""

Use = Callable[[str], None]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Set the rest of the worker script that the next `generate` starts."""
    monkeypatch.setattr(dispatcher, "WORKER", tmp_path / "worker.py")
    return lambda body: write_worker(tmp_path, body)


@pytest.fixture(autouse=True)
def kill_leftover_processes(tmp_path: Path) -> Iterator[None]:
    """Leave no worker running after a failed test."""
    yield
    for file in tmp_path.glob("*.pid"):
        pid = int(file.read_text())
        with suppress(FileNotFoundError, ProcessLookupError):
            if str(tmp_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def write_worker(directory: Path, body: str) -> None:
    (directory / "worker.py").write_text(WORKER.format(directory=str(directory)) + body)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path / "synthetic")


def run_job(shards: Shards, engines: int | None = 1) -> None:
    generate(JOB, shards, lambda: iter(REQUESTS), lambda: Path(sys.executable), engines=engines)


def test_every_shard_is_announced_once_it_is_written(use: Use, shards: Shards) -> None:
    use("serve()")
    announced: list[int] = []

    def on_shard(number: int) -> None:
        assert len(shards.read(number)) == min(SHARD, TOTAL - number * SHARD)
        announced.append(number)

    def start() -> None:
        generate(JOB, shards, lambda: iter(REQUESTS), lambda: Path(sys.executable), engines=1, on_shard=on_shard)

    start()
    assert sorted(announced) == [0, 1, 2]
    shards.shard(1).unlink()
    start()
    assert announced[3:] == [1]


def error_of(shards: Shards) -> str:
    """Return the one-line error of a failed job."""
    with pytest.raises(SpinError) as caught:
        run_job(shards)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(numbers: range) -> list[dict[str, Any]]:
    return [
        {
            "split": REQUESTS[n].split,
            "example": 1000 + n,
            "tokens": [7 * n, n, n + 1, 2],
            "finish": "length" if n % 2 else "stop",
            "stop": 2,
        }
        for n in numbers
    ]


def requested(directory: Path) -> list[int]:
    return [request["number"] for request in json.loads((directory / "requests").read_text())]


def is_gone(pid: int) -> bool:
    """Return whether a process has exited or is a zombie, which some init processes never reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, at most 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


ANSWER_ALL = "serve()\n"
LEAVE_A_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", str(directory)])
(directory / "child.pid").write_text(str(child.pid))
"""


# --- a worker that answers every request -------------------------------------------------------


def test_responses_are_stored_in_request_order(use: Use, shards: Shards, tmp_path: Path) -> None:
    """vLLM finishes requests in any order."""
    use("for request in sorted(requests, key=lambda r: r['number'] * 7919 % 600): answer(request)\n")
    run_job(shards)
    assert list(shards.responses()) == expected(range(TOTAL))
    assert shards.missing(JOB) == []
    manifest = shards.manifest()
    assert manifest is not None
    assert manifest["vllm"] == "0.0.tiny"
    assert "tiny worker started" in shards.log_of(0).read_text()
    names = sorted(path.name for path in shards.directory.iterdir())
    assert names == ["job.json", "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl", "vllm.log"]
    assert is_gone(int((tmp_path / "worker-0False.pid").read_text()))


def test_worker_receives_the_job_and_its_requests(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("(directory / 'job').write_text(json.dumps(job))\n" + ANSWER_ALL)
    run_job(shards)
    job = json.loads((tmp_path / "job").read_text())
    assert (job["engine"], job["adapter"], job["sampling"]) == (JOB.engine, None, JOB.sampling)
    assert json.loads((tmp_path / "requests").read_text()) == [
        {"number": r.number, "prompt": r.prompt, "max_tokens": r.max_tokens, "seed": r.seed, "score": r.number < SCORED}
        for r in REQUESTS
    ]


def test_only_train_requests_are_scored() -> None:
    """Eval requests can come first."""
    held_out = [r._replace(split="eval") for r in REQUESTS[:100]]
    marked = list(scored([*held_out, *REQUESTS[100:]]))
    assert [r.number for r, _ in marked] == list(range(TOTAL))
    assert [r.number for r, score in marked if score] == list(range(100, 100 + SCORED))


def test_logps_are_stored_if_vllm_returns_them(use: Use, shards: Shards) -> None:
    use(
        ANSWER_ALL.replace("serve()", "")
        + "for r in requests:\n"
        + "    logps = [-0.5, -0.25] if r['score'] and r['number'] else None\n"
        + "    send(number=r['number'], tokens=[1, 2], finish='stop', stop=2, logps=logps)\n"
    )
    run_job(shards)
    stored = [response.get("logps") for response in shards.responses()]
    assert stored == [None] + (SCORED - 1) * [[-0.5, -0.25]] + (TOTAL - SCORED) * [None]


def test_progress_in_a_log_file_has_a_first_and_a_last_line(
    use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    use(ANSWER_ALL)
    run_job(shards)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "spin: iteration 2: generating responses: 600 requested, vLLM is starting"
    assert last.startswith("spin: iteration 2: generating responses: 600 in ")


def test_no_interpreter_is_needed_if_all_shards_exist(use: Use, shards: Shards) -> None:
    use(ANSWER_ALL)
    run_job(shards)

    def no_python() -> Path:
        raise AssertionError("find_python was called")

    generate(JOB, shards, lambda: iter(REQUESTS), no_python)


def test_only_missing_shards_are_generated(use: Use, shards: Shards, tmp_path: Path) -> None:
    use(ANSWER_ALL)
    run_job(shards)
    kept = shards.shard(0).stat().st_mtime_ns
    shards.shard(1).write_text("damaged")
    run_job(shards)
    assert requested(tmp_path) == list(range(SHARD, 2 * SHARD))
    assert list(shards.responses()) == expected(range(TOTAL))
    assert shards.shard(0).stat().st_mtime_ns == kept


def test_failure_after_the_last_response_is_ignored(use: Use, shards: Shards) -> None:
    use("for request in requests: answer(request)\nraise RuntimeError('shutdown')\n")
    run_job(shards)
    assert shards.missing(JOB) == []


# --- a worker that fails -----------------------------------------------------------------------


def test_crash_is_explained_and_finished_shards_are_kept(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("for request in requests[:300]: answer(request)\nraise RuntimeError('the device is on fire')\n")
    message = error_of(shards)
    assert message.startswith("vLLM stopped after 300 of 600 responses: RuntimeError: the device is on fire; ")
    assert str(shards.log_of(0)) in message
    assert "rerun the same command" in message
    assert "Traceback" in shards.log_of(0).read_text()
    assert shards.missing(JOB) == [1, 2]
    assert not shards.requests.exists()

    use(ANSWER_ALL)
    run_job(shards)
    assert requested(tmp_path) == list(range(SHARD, TOTAL))
    assert list(shards.responses()) == expected(range(TOTAL))


def test_shards_finished_out_of_order_are_kept(use: Use, shards: Shards) -> None:
    use("for request in requests[-100:]: answer(request)\nraise RuntimeError('x')\n")
    error_of(shards)
    assert shards.missing(JOB) == [0, 1]


@pytest.mark.parametrize("code", [0, 3])
def test_early_exit_is_an_error_with_any_exit_code(use: Use, shards: Shards, code: int) -> None:
    use(f"answer(requests[0])\nsys.exit({code})\n")
    assert error_of(shards).startswith("vLLM stopped after 1 of 600 responses: tiny worker started; see ")


def test_exit_without_output(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("")
    (tmp_path / "worker.py").write_text("")
    log = shards.log_of(0)
    assert f"vLLM stopped after 0 of 600 responses: no output; see {log}" in error_of(shards)


def test_worker_killed_in_the_middle_of_a_message(use: Use, shards: Shards) -> None:
    """The kernel's out-of-memory killer does not wait for the end of a line."""
    use('answer(requests[0])\nout.write(\'{"number": 1, "tok\')\nout.flush()\nos.kill(os.getpid(), signal.SIGKILL)\n')
    assert error_of(shards).startswith("vLLM stopped after 1 of 600 responses: ")


def test_silent_exit_is_not_explained_by_an_earlier_log(use: Use, shards: Shards) -> None:
    use("raise RuntimeError('of the first attempt')\n")
    assert "of the first attempt" in error_of(shards)
    use("sys.exit(0)\n")
    assert "of the first attempt" not in error_of(shards)


# --- several engines, and the retry ------------------------------------------------------------

ANSWER_SOME_AND_EXIT = """
ready()
for request in next(submitted_shards())[:100]:
    answer(request)
os.kill(os.getpid(), signal.SIGKILL)
"""


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("spin: warning: ")]


def test_killed_worker_is_retried_with_less_memory(
    use: Use, shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use("if retry: serve()\n" + ANSWER_SOME_AND_EXIT)
    run_job(shards)
    assert list(shards.responses()) == expected(range(TOTAL))
    (warning,) = warnings(capsys)
    assert "vLLM stopped after 100 of 600 responses: killed by signal 9" in warning
    assert "once more with less memory" in warning
    assert shards.log_of(0).exists()
    assert shards.log_of(0, retry=True).exists()


def test_there_is_only_one_retry(use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]) -> None:
    use(ANSWER_SOME_AND_EXIT)
    assert "vLLM stopped after 100 of 600 responses: killed by signal 9" in error_of(shards)
    assert len(warnings(capsys)) == 1


def test_worker_that_refuses_to_start_is_not_retried(
    use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    use("raise ValueError('no such argument')\n")
    assert "ValueError: no such argument" in error_of(shards)
    assert not warnings(capsys)


def test_worker_out_of_memory_is_retried(use: Use, shards: Shards) -> None:
    use("if retry: serve()\nraise RuntimeError('CUDA out of memory')\n")
    run_job(shards)
    assert shards.missing(JOB) == []


@pytest.mark.parametrize(
    ("before", "timeout", "cause"),
    [("ready()\n", "HEARTBEAT_TIMEOUT", "1 s without heartbeat"), ("", "LOADING_TIMEOUT", "1 s without output while")],
    ids=["ready", "loading"],
)
def test_hung_worker_is_killed_and_retried(
    use: Use,
    shards: Shards,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    timeout: str,
    cause: str,
) -> None:
    monkeypatch.setattr(engine, timeout, 1.0)
    use("if retry: serve()\n" + LEAVE_A_CHILD + before + "os.kill(os.getpid(), signal.SIGSTOP)\n")
    run_job(shards)
    (warning,) = warnings(capsys)
    assert cause in warning
    for name in ("worker-0False.pid", "child.pid"):
        assert wait_until(lambda name=name: is_gone(int((tmp_path / name).read_text())))


def test_engines_share_the_shards(use: Use, shards: Shards, tmp_path: Path) -> None:
    """The first engine waits until the second has a shard, which it gets only if the first has not taken all."""
    use(
        """
ready()
submitted = submitted_shards()
shard = next(submitted)
(directory / f"has-work-{number}").write_text("")
while len(list(directory.glob("has-work-*"))) < 2:
    pass
for request in shard: answer(request)
for shard in submitted:
    for request in shard: answer(request)
"""
    )
    run_job(shards, engines=2)
    assert list(shards.responses()) == expected(range(TOTAL))


def test_shards_of_a_killed_engine_are_requeued(use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]) -> None:
    """The second engine becomes ready only after the first is killed."""
    use(
        """
if number == 0:
    ready()
    for request in next(submitted_shards())[:100]:
        answer(request)
    (directory / "killed").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
while not (directory / "killed").exists():
    pass
serve()
"""
    )
    run_job(shards, engines=2)
    assert list(shards.responses()) == expected(range(TOTAL))
    (warning,) = warnings(capsys)
    assert "1 left to generate its responses: killed by signal 9" in warning


def test_exit_of_all_engines_is_an_error(use: Use, shards: Shards) -> None:
    use(ANSWER_SOME_AND_EXIT)
    assert "responses: killed by signal 9" in error_of(shards)


def test_at_most_one_engine_per_shard(use: Use, shards: Shards) -> None:
    use(ANSWER_ALL)
    run_job(shards, engines=8)
    assert len(shards.logs()) == 3


# --- no process is left running ----------------------------------------------------------------


@pytest.mark.parametrize("end", [ANSWER_ALL, "raise RuntimeError('boom')\n"], ids=["success", "crash"])
def test_child_of_the_worker_is_killed(use: Use, shards: Shards, tmp_path: Path, end: str) -> None:
    """vLLM's engine is a separate process and can hold the entire GPU."""
    use(LEAVE_A_CHILD + end)
    if end == ANSWER_ALL:
        run_job(shards)
    else:
        error_of(shards)
    assert wait_until(lambda: is_gone(int((tmp_path / "child.pid").read_text())))


LEAVE_LARGE_CHILDREN = """
for child in range(6):
    if os.fork() == 0:
        held = b"x" * (96 << 20)
        (directory / f"large-{child}.pid").write_text(str(os.getpid()))
        while True:
            signal.pause()
while len([pid for pid in directory.glob("large-*.pid") if pid.read_text()]) < 6:
    pass
"""


@pytest.mark.parametrize("end", [ANSWER_ALL, "os._exit(1)\n"], ids=["success", "crash"])
def test_generate_returns_once_all_memory_is_free(use: Use, shards: Shards, tmp_path: Path, end: str) -> None:
    """Training or the retry needs the entire GPU next, and freeing memory takes a while."""
    use(LEAVE_LARGE_CHILDREN + end)
    if end == ANSWER_ALL:
        run_job(shards)
    else:
        error_of(shards)
    assert all(is_gone(int(file.read_text())) for file in tmp_path.glob("large-*.pid"))


def test_process_group_is_killed_only_before_it_is_reaped(
    use: Use, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards the system can give its id to another group."""
    killed, kill = [], os.killpg

    def record(group: int, number: int) -> None:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            not_reaped.append(group)
        killed.append(group)
        kill(group, number)

    not_reaped: list[int] = []
    monkeypatch.setattr(os, "killpg", record)
    use("if number == 0:\n    ready()\n    next(submitted_shards())\n    os._exit(1)\nserve()\n")  # one exits
    run_job(shards, engines=2)
    assert len(set(killed)) == 2
    assert killed == not_reaped


def test_unkillable_process_is_reported(
    use: Use, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process can hang in a driver; here it never gets SIGKILL."""
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    monkeypatch.setattr(engine, "EXIT_TIMEOUT", 0.5)
    use(LEAVE_A_CHILD + "raise RuntimeError('boom')\n")
    assert "boom" in error_of(shards)
    (warning,) = warnings(capsys)
    assert f"its processes {(tmp_path / 'child.pid').read_text()} are still running" in warning


def test_ignored_sigchld_is_supported(use: Use, shards: Shards) -> None:
    """Some launchers ignore it; children then cannot be waited for."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        use(ANSWER_ALL)
        run_job(shards)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert shards.missing(JOB) == []


def test_forked_child_with_an_open_pipe_does_not_block_the_launcher(use: Use, shards: Shards, tmp_path: Path) -> None:
    """vLLM's forked engine inherits the pipe, so the launcher must watch the worker's process too, not only the pipe.
    The child exits after five seconds, so that a failing test ends."""
    use(
        """
def time_out(*_):
    (directory / "outlived").write_text("")
    os._exit(0)

if os.fork() == 0:
    signal.signal(signal.SIGALRM, time_out)
    signal.alarm(5)
    while True:
        signal.pause()
os._exit(1)
"""
    )
    assert error_of(shards).startswith("vLLM stopped after 0 of 600 responses: ")
    assert not (tmp_path / "outlived").exists()


def test_interrupt_kills_the_worker(use: Use, shards: Shards, tmp_path: Path) -> None:
    """Ctrl-C does not reach the worker, which has its own session."""
    # Send it repeatedly: an exception raised inside a callback of the garbage collector is lost.
    use(
        LEAVE_A_CHILD
        + "import time\nlauncher = os.getppid()\n"
        + "while os.getppid() == launcher:\n    os.kill(launcher, signal.SIGINT)\n    time.sleep(20)\n"
    )
    # Background jobs of a shell, and so possibly CI, ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_job(shards)
    finally:
        signal.signal(signal.SIGINT, before)
    for name in ("worker-0False.pid", "child.pid"):
        assert wait_until(lambda name=name: is_gone(int((tmp_path / name).read_text())))
    assert not shards.requests.exists()


LAUNCH = """
import sys
from pathlib import Path
from spin_plugin.generation import dispatcher
from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.shards import Shards

directory = Path(sys.argv[1])
dispatcher.WORKER = directory / "worker.py"
job = Job(0, {}, None, "abc", {}, 1, "def")
requests = lambda: iter([Request(0, "train", 0, [1], 4, 0)])
dispatcher.generate(job, Shards(directory / "synthetic"), requests, lambda: Path(sys.executable))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_worker_exits_when_the_launcher_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    """Uses the real `read_request_files`, because no launcher is left to clean up."""
    real_worker = ROOT / "spin_plugin" / "generation" / "vllm_worker.py"
    write_worker(
        tmp_path,
        f"""
import importlib.util, threading
spec = importlib.util.spec_from_file_location("vllm_worker", {str(real_worker)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
threading.Thread(target=worker.read_request_files, args=(worker.SimpleQueue(),), daemon=True).start()
{LEAVE_A_CHILD}
(directory / "running").write_text("")
while True:
    signal.pause()
""",
    )
    launching = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        assert wait_until((tmp_path / "running").exists)
        pids = [int((tmp_path / name).read_text()) for name in ("worker-0False.pid", "child.pid")]
        assert not any(is_gone(pid) for pid in pids)
    finally:
        launching.send_signal(end)
        launching.wait()
    assert wait_until(lambda: all(is_gone(pid) for pid in pids))


# --- the worker's environment ------------------------------------------------------------------


def test_training_variables_and_secrets_are_removed(
    use: Use, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_TOKEN is kept, because vLLM may download a gated model."""
    kept = {
        "HF_TOKEN": "hf",
        "HF_HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "MY_PATH": "x",
    }
    removed = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
        "MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "bf16", "TORCHELASTIC_RUN_ID": "1", "FSDP_VERSION": "2",
        "PYTHONPATH": "/training", "WANDB_API_KEY": "s", "OPENAI_API_KEY": "s", "AWS_SESSION_TOKEN": "s",
        "DB_PASSWORD": "s", "client_secret": "s",
    }  # fmt: skip
    for name, value in (kept | removed).items():
        monkeypatch.setenv(name, value)
    use("(directory / 'environment').write_text(json.dumps(dict(os.environ)))\n" + ANSWER_ALL)
    run_job(shards)
    seen = json.loads((tmp_path / "environment").read_text())
    assert {name: seen.get(name) for name in kept} == kept
    assert not seen.keys() & removed.keys()
    assert seen["GLOO_SOCKET_IFNAME"] == "lo"  # vLLM must not listen on the network
    assert os.environ["WANDB_API_KEY"] == "s"


def test_worker_leads_its_own_session(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("(directory / 'session').write_text(str(os.getsid(0) == os.getpgid(0) == os.getpid()))\n" + ANSWER_ALL)
    run_job(shards)
    assert (tmp_path / "session").read_text() == "True"


# --- exit diagnosis ----------------------------------------------------------------------------

ENGINE_DIED = """
INFO 11-22 12:00:00 [core.py:58] Initializing a V1 LLM engine (v0.25.0)
(EngineCore_DP0 pid=4711) ERROR 11-22 12:00:09 [core.py:708] EngineCore failed to start.
(EngineCore_DP0 pid=4711) ERROR 11-22 12:00:09 [core.py:708] Traceback (most recent call last):
(EngineCore_DP0 pid=4711) ERROR 11-22 12:00:09 [core.py:708]   File "/x/core.py", line 699, in run_engine_core
{cause}
Traceback (most recent call last):
  File "/x/vllm_worker.py", line 93, in <module>
    main()
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""
PREFIX = "(EngineCore_DP0 pid=4711) ERROR 11-22 12:00:09 [core.py:708] "


@pytest.mark.parametrize(
    ("raised", "advice"),
    [
        (
            "ValueError: No available memory for the cache blocks. Try increasing it.",
            "raise vllm.gpu_memory_",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB.", "lower vllm.gpu_memory_"),
        ("ValueError: Free memory on device (1/80 GiB) on startup is less than desired.", "free the GPU or lower"),
        (
            "ValueError: To serve at least one request with the models's max seq len (9), 1 GiB is needed.",
            "max_model_len",
        ),
    ],
)
def test_root_cause_of_the_engine_comes_with_advice(tmp_path: Path, raised: str, advice: str) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(ENGINE_DIED.format(cause=PREFIX + raised))
    cause = diagnose_exit(log)
    assert cause.startswith(f"{raised}; ")
    assert advice in cause
    assert cause.endswith(f"; see {log}")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no output"),
        ("\n  \n", "no output"),
        ("loading\nstill loading\n", "still loading"),
        ("Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'vllm'\n",
         "ModuleNotFoundError: No module named 'vllm'"),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error\nsee the documentation\n",
         "huggingface_hub.errors.GatedRepoError: 401 Client Error"),
        ("Traceback (most recent call last):\n  File x\n    assert x\nAssertionError\n", "AssertionError"),
    ],
)  # fmt: skip
def test_unknown_cause_has_no_advice(tmp_path: Path, text: str, cause: str) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(text)
    assert diagnose_exit(log) == f"{cause}; see {log}"


def test_signal_takes_precedence_over_the_log(tmp_path: Path) -> None:
    """Errors in the log are older than the signal."""
    log = tmp_path / "vllm.log"
    log.write_text("ValueError: Tokenizer not available\n")
    cause = diagnose_exit(log, -signal.SIGKILL)
    assert cause.startswith("killed by signal 9 (Killed; out of memory?); lower vllm.gpu_memory_")
    assert diagnose_exit(log, -signal.SIGTERM) == f"killed by signal 15 (Terminated); see {log}"


def test_exceptions_logged_as_warnings_are_ignored(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "WARNING 11-22 12:00:09 [renderer.py:1] Chat template warmup failed\n"
        "WARNING 11-22 12:00:09 [renderer.py:1] Traceback (most recent call last):\n"
        "WARNING 11-22 12:00:09 [renderer.py:1] ValueError: Tokenizer not available\n"
        "bye\n"
    )
    assert diagnose_exit(log, 1) == f"bye; see {log}"


def test_advice_uses_this_plugins_option_names(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "ValueError: Available memory on node 0 (8.1/23.4 GiB) on startup is less than desired CPU memory utilization "
        "(0.92, 21.6 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory "
        "reserved (despite its name). To resolve: decrease `--gpu-memory-utilization` (e.g. `--gpu-memory-utilization "
        "0.5`) or reduce CPU memory used by other processes.\n"
    )
    cause = diagnose_exit(log, 1)
    assert "--gpu" not in cause
    assert "(0.92, 21.6 GiB).; free memory, or lower vllm.gpu_memory_utilization" in cause


def test_long_cause_is_shortened_between_words(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("RuntimeError: " + "word " * 200)
    assert "word …; see " in diagnose_exit(log, 1)


def test_cause_is_short_and_readable(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"\xff\xfe progress\r\nRuntimeError: " + b"x" * 5000 + b"\n" + b"shutting down\n" * 10)
    cause = diagnose_exit(log)
    assert cause.startswith("RuntimeError: xxx")
    assert len(cause) < 400 + len(str(log))
