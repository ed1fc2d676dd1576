"""The launcher with real worker processes: small scripts that speak the protocol of vllm_worker.py."""

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

from spin_plugin.generation import engine, launcher
from spin_plugin.generation.cause import cause_of_death
from spin_plugin.generation.job import SCORED, SHARD, Job, Request, scored
from spin_plugin.generation.launcher import generate
from spin_plugin.generation.shards import Shards
from spin_plugin.messages import SpinError

TOTAL = 2 * SHARD + 88  # two whole shards and a short one
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

# Every worker below begins like this. `folder` is the test's.
WORKER = """
import json, os, signal, subprocess, sys
from pathlib import Path

folder = Path({folder!r})
job = json.loads(Path(sys.argv[1]).read_text())
os.set_inheritable(int(sys.argv[2]), False)
out = open(int(sys.argv[2]), "w", buffering=1)
requests = [json.loads(line) for file in sorted(Path(job["requests"]).glob("*.jsonl")) for line in open(file)]
again = job["less_memory"]
number = int(Path(sys.argv[1]).stem.rpartition("-")[2])

def send(**content):
    out.write(json.dumps(content) + "\\n")

def answer(request):
    finish = "length" if request["number"] % 2 else "stop"
    send(number=request["number"], tokens=[request["seed"], *request["prompt"], 2], finish=finish, stop=2)

def orders():
    # the requests of the shards that the launcher hands out, until it ends this process
    for path in sys.stdin:
        yield [json.loads(line) for line in open(path.strip())]

def ready():
    send(ready=True, seats=1 << 20)

def serve():
    ready()
    for shard in orders():
        for request in shard:
            answer(request)

(folder / f"worker-{{number}}{{again}}.pid").write_text(str(os.getpid()))
(folder / "asked").write_text(json.dumps(requests))
print("tiny worker started", flush=True)
send(vllm="0.0.tiny")
"""

Use = Callable[[str], None]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Make a script's end the worker of the next `generate`."""
    monkeypatch.setattr(launcher, "WORKER", tmp_path / "worker.py")
    return lambda body: write_worker(tmp_path, body)


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path) -> Iterator[None]:
    """A launcher that fails a test leaves no process on the machine either."""
    yield
    for file in tmp_path.glob("*.pid"):
        pid = int(file.read_text())
        with suppress(FileNotFoundError, ProcessLookupError):
            if str(tmp_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def write_worker(folder: Path, body: str) -> None:
    (folder / "worker.py").write_text(WORKER.format(folder=str(folder)) + body)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path / "synthetic")


def draw(shards: Shards, engines: int | None = 1) -> None:
    generate(JOB, shards, lambda: iter(REQUESTS), lambda: Path(sys.executable), engines=engines)


def refusal(shards: Shards) -> str:
    """The one line by which a failed `draw` is explained."""
    with pytest.raises(SpinError) as caught:
        draw(shards)
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


def asked(folder: Path) -> list[int]:
    return [request["number"] for request in json.loads((folder / "asked").read_text())]


def is_gone(pid: int) -> bool:
    """Ended, or a zombie that an init process without reaping leaves behind."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> bool:
    """Look until it is so, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


ANSWER_ALL = "serve()\n"
LEAVE_A_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", str(folder)])
(folder / "child.pid").write_text(str(child.pid))
"""


# --- a worker that answers ---------------------------------------------------------------------


def test_every_response_is_stored_in_the_order_of_the_requests(use: Use, shards: Shards, tmp_path: Path) -> None:
    """vLLM finishes them in any order."""
    use("for request in sorted(requests, key=lambda r: r['number'] * 7919 % 600): answer(request)\n")
    draw(shards)
    assert list(shards.responses()) == expected(range(TOTAL))
    assert shards.missing(JOB) == []
    manifest = shards.manifest()
    assert manifest is not None
    assert manifest["vllm"] == "0.0.tiny"
    assert "tiny worker started" in shards.log_of(0).read_text()
    names = sorted(path.name for path in shards.folder.iterdir())
    assert names == ["job.json", "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl", "vllm.log"]
    assert is_gone(int((tmp_path / "worker-0False.pid").read_text()))


def test_worker_is_told_everything_it_needs(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("(folder / 'job').write_text(json.dumps(job))\n" + ANSWER_ALL)
    draw(shards)
    job = json.loads((tmp_path / "job").read_text())
    assert (job["engine"], job["adapter"], job["sampling"]) == (JOB.engine, None, JOB.sampling)
    assert json.loads((tmp_path / "asked").read_text()) == [
        {"number": r.number, "prompt": r.prompt, "max_tokens": r.max_tokens, "seed": r.seed, "score": r.number < SCORED}
        for r in REQUESTS
    ]


def test_what_is_scored_can_become_pairs_to_train_on() -> None:
    """Held-out requests may come first, and a run that goes on asks for what the first start had asked for."""
    held_out = [r._replace(split="eval") for r in REQUESTS[:100]]
    asked = list(scored([*held_out, *REQUESTS[100:]]))
    assert [r.number for r, _ in asked] == list(range(TOTAL))
    assert [r.number for r, score in asked if score] == list(range(100, 100 + SCORED))


def test_what_vllm_says_of_the_tokens_is_stored(use: Use, shards: Shards) -> None:
    """As far as it says anything."""
    use(
        ANSWER_ALL.replace("serve()", "")
        + "for r in requests:\n"
        + "    logps = [-0.5, -0.25] if r['score'] and r['number'] else None\n"
        + "    send(number=r['number'], tokens=[1, 2], finish='stop', stop=2, logps=logps)\n"
    )
    draw(shards)
    stored = [response.get("logps") for response in shards.responses()]
    assert stored == [None] + (SCORED - 1) * [[-0.5, -0.25]] + (TOTAL - SCORED) * [None]


def test_progress_is_a_line_at_each_end_of_a_log_file(
    use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    use(ANSWER_ALL)
    draw(shards)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "spin: iteration 2: drawing responses: 600 responses wanted, vLLM is starting"
    assert last.startswith("spin: iteration 2: drawing responses: 600 in ")


def test_nobody_is_asked_when_everything_is_there(use: Use, shards: Shards) -> None:
    use(ANSWER_ALL)
    draw(shards)

    def no_python() -> Path:
        raise AssertionError("the interpreter was asked for")

    generate(JOB, shards, lambda: iter(REQUESTS), no_python)


def test_only_missing_shards_are_asked_for(use: Use, shards: Shards, tmp_path: Path) -> None:
    use(ANSWER_ALL)
    draw(shards)
    kept = shards.shard(0).stat().st_mtime_ns
    shards.shard(1).write_text("damaged")
    draw(shards)
    assert asked(tmp_path) == list(range(SHARD, 2 * SHARD))
    assert list(shards.responses()) == expected(range(TOTAL))
    assert shards.shard(0).stat().st_mtime_ns == kept


def test_worker_that_fails_after_its_last_answer_has_done_its_work(use: Use, shards: Shards) -> None:
    use("for request in requests: answer(request)\nraise RuntimeError('shutdown')\n")
    draw(shards)
    assert shards.missing(JOB) == []


# --- a worker that does not --------------------------------------------------------------------


def test_crash_is_explained_and_what_is_finished_is_kept(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("for request in requests[:300]: answer(request)\nraise RuntimeError('the device is on fire')\n")
    message = refusal(shards)
    assert message.startswith("vLLM stopped after 300 of 600 responses: RuntimeError: the device is on fire; ")
    assert str(shards.log_of(0)) in message
    assert "run the same command again" in message
    assert "Traceback" in shards.log_of(0).read_text()
    assert shards.missing(JOB) == [1, 2]
    assert not shards.requests.exists()

    use(ANSWER_ALL)
    draw(shards)
    assert asked(tmp_path) == list(range(SHARD, TOTAL))
    assert list(shards.responses()) == expected(range(TOTAL))


def test_shards_that_are_finished_out_of_order_are_kept(use: Use, shards: Shards) -> None:
    use("for request in requests[-100:]: answer(request)\nraise RuntimeError('x')\n")
    refusal(shards)
    assert shards.missing(JOB) == [0, 1]


@pytest.mark.parametrize("code", [0, 3])
def test_early_end_is_no_success_whatever_the_exit_code(use: Use, shards: Shards, code: int) -> None:
    use(f"answer(requests[0])\nsys.exit({code})\n")
    assert refusal(shards).startswith("vLLM stopped after 1 of 600 responses: tiny worker started; its log is ")


def test_end_before_the_first_word(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("")
    (tmp_path / "worker.py").write_text("")
    log = shards.log_of(0)
    assert f"vLLM stopped after 0 of 600 responses: it printed nothing; its log is {log}" in refusal(shards)


def test_end_by_a_signal_in_the_middle_of_an_answer(use: Use, shards: Shards) -> None:
    """The kernel ends what takes too much memory, in the middle of a line too."""
    use('answer(requests[0])\nout.write(\'{"number": 1, "tok\')\nout.flush()\nos.kill(os.getpid(), signal.SIGKILL)\n')
    assert refusal(shards).startswith("vLLM stopped after 1 of 600 responses: ")


def test_silent_end_is_not_blamed_on_the_error_of_an_earlier_attempt(use: Use, shards: Shards) -> None:
    use("raise RuntimeError('of the first attempt')\n")
    assert "of the first attempt" in refusal(shards)
    use("sys.exit(0)\n")
    assert "of the first attempt" not in refusal(shards)


# --- several engines, and a second attempt -----------------------------------------------------

ANSWER_SOME_AND_DIE = """
ready()
for request in next(orders())[:100]:
    answer(request)
os.kill(os.getpid(), signal.SIGKILL)
"""


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("spin: warning: ")]


def test_killed_worker_is_started_once_more_with_less_memory(
    use: Use, shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use("if again: serve()\n" + ANSWER_SOME_AND_DIE)
    draw(shards)
    assert list(shards.responses()) == expected(range(TOTAL))
    (warning,) = warnings(capsys)
    assert "vLLM stopped after 100 of 600 responses: it was killed by signal 9" in warning
    assert "once more with less memory" in warning
    assert shards.log_of(0).exists()
    assert shards.log_of(0, again=True).exists()


def test_two_attempts_are_all(use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]) -> None:
    use(ANSWER_SOME_AND_DIE)
    assert "vLLM stopped after 100 of 600 responses: it was killed by signal 9" in refusal(shards)
    assert len(warnings(capsys)) == 1


def test_worker_that_refuses_to_start_is_not_started_again(
    use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    use("raise ValueError('no such argument')\n")
    assert "ValueError: no such argument" in refusal(shards)
    assert not warnings(capsys)


def test_worker_short_of_memory_is_started_again(use: Use, shards: Shards) -> None:
    use("if again: serve()\nraise RuntimeError('CUDA out of memory')\n")
    draw(shards)
    assert shards.missing(JOB) == []


@pytest.mark.parametrize(
    ("before", "patience", "told"),
    [("ready()\n", "PATIENCE", "no answer for 1 s"), ("", "LOADING_PATIENCE", "no sign of life while loading for 1 s")],
    ids=["at work", "loading"],
)
def test_worker_that_hangs_is_ended_and_started_again(
    use: Use,
    shards: Shards,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    patience: str,
    told: str,
) -> None:
    monkeypatch.setattr(engine, patience, 1.0)
    use("if again: serve()\n" + LEAVE_A_CHILD + before + "os.kill(os.getpid(), signal.SIGSTOP)\n")
    draw(shards)
    (warning,) = warnings(capsys)
    assert told in warning
    for name in ("worker-0False.pid", "child.pid"):
        assert wait_until(lambda name=name: is_gone(int((tmp_path / name).read_text())))


def test_engines_share_the_shards(use: Use, shards: Shards, tmp_path: Path) -> None:
    """The first that is ready does not take them all: it answers nothing before the second has been asked."""
    use(
        """
ready()
asked = orders()
shard = next(asked)
(folder / f"has-work-{number}").write_text("")
while len(list(folder.glob("has-work-*"))) < 2:
    pass
for request in shard: answer(request)
for shard in asked:
    for request in shard: answer(request)
"""
    )
    draw(shards, engines=2)
    assert list(shards.responses()) == expected(range(TOTAL))


def test_shards_of_a_dead_engine_go_to_the_others(use: Use, shards: Shards, capsys: pytest.CaptureFixture[str]) -> None:
    """The other waits with its answers until the first is dead."""
    use(
        """
if number == 0:
    ready()
    for request in next(orders())[:100]:
        answer(request)
    (folder / "dies").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
while not (folder / "dies").exists():
    pass
serve()
"""
    )
    draw(shards, engines=2)
    assert list(shards.responses()) == expected(range(TOTAL))
    (warning,) = warnings(capsys)
    assert "1 go on with its responses: it was killed by signal 9" in warning


def test_all_engines_dead_is_an_error(use: Use, shards: Shards) -> None:
    use(ANSWER_SOME_AND_DIE)
    assert "responses: it was killed by signal 9" in refusal(shards)


def test_no_more_engines_than_shards(use: Use, shards: Shards) -> None:
    use(ANSWER_ALL)
    draw(shards, engines=8)
    assert len(shards.logs()) == 3


# --- nothing stays behind ----------------------------------------------------------------------


@pytest.mark.parametrize("end", [ANSWER_ALL, "raise RuntimeError('boom')\n"], ids=["success", "crash"])
def test_child_that_the_worker_leaves_behind_is_killed(use: Use, shards: Shards, tmp_path: Path, end: str) -> None:
    """vLLM's engine is a process of its own and may hold the whole GPU."""
    use(LEAVE_A_CHILD + end)
    if end == ANSWER_ALL:
        draw(shards)
    else:
        refusal(shards)
    assert wait_until(lambda: is_gone(int((tmp_path / "child.pid").read_text())))


LEAVE_LARGE_CHILDREN = """
for child in range(6):
    if os.fork() == 0:
        held = b"x" * (96 << 20)
        (folder / f"large-{child}.pid").write_text(str(os.getpid()))
        while True:
            signal.pause()
while len([pid for pid in folder.glob("large-*.pid") if pid.read_text()]) < 6:
    pass
"""


@pytest.mark.parametrize("end", [ANSWER_ALL, "os._exit(1)\n"], ids=["success", "crash"])
def test_memory_of_all_processes_is_free_when_the_launcher_goes_on(
    use: Use, shards: Shards, tmp_path: Path, end: str
) -> None:
    """What comes next, a second attempt or training, wants the whole GPU; to give memory back takes its time."""
    use(LEAVE_LARGE_CHILDREN + end)
    if end == ANSWER_ALL:
        draw(shards)
    else:
        refusal(shards)
    assert all(is_gone(int(file.read_text())) for file in tmp_path.glob("large-*.pid"))


def test_group_is_killed_only_while_its_number_is_ours(
    use: Use, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its leader is reaped, a stranger's group may have the number; where numbers are few, soon."""
    killed, kill = [], os.killpg

    def watched(group: int, number: int) -> None:
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            ours.append(group)
        killed.append(group)
        kill(group, number)

    ours: list[int] = []
    monkeypatch.setattr(os, "killpg", watched)
    use("if number == 0:\n    ready()\n    next(orders())\n    os._exit(1)\nserve()\n")  # one dies, the other is ended
    draw(shards, engines=2)
    assert len(set(killed)) == 2
    assert killed == ours


def test_process_that_cannot_be_killed_is_named_and_not_waited_for(
    use: Use, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that hangs in a driver; here SIGKILL is kept from it."""
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    monkeypatch.setattr(engine, "SECONDS_UNTIL_GONE", 0.5)
    use(LEAVE_A_CHILD + "raise RuntimeError('boom')\n")
    assert "boom" in refusal(shards)
    (warning,) = warnings(capsys)
    assert f"its processes {(tmp_path / 'child.pid').read_text()} still have not ended" in warning


def test_signal_of_dead_children_may_be_ignored(use: Use, shards: Shards) -> None:
    """As some launchers have it; nobody can wait for a child then."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        use(ANSWER_ALL)
        draw(shards)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert shards.missing(JOB) == []


def test_forked_child_that_holds_the_answers_open_does_not_keep_the_launcher_waiting(
    use: Use, shards: Shards, tmp_path: Path
) -> None:
    """vLLM forks its engine, which inherits the pipe: the worker's end must be noticed by its process, not only by
    the end of the answers. The child gives up by itself, so that the test ends either way."""
    use(
        """
def give_up(*_):
    (folder / "outlived").write_text("")
    os._exit(0)

if os.fork() == 0:
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    while True:
        signal.pause()
os._exit(1)
"""
    )
    assert refusal(shards).startswith("vLLM stopped after 0 of 600 responses: ")
    assert not (tmp_path / "outlived").exists()


def test_interrupt_ends_the_worker(use: Use, shards: Shards, tmp_path: Path) -> None:
    """It lives in a session of its own, so Ctrl-C does not reach it."""
    # More than once: an exception that a signal raises inside a callback of the garbage collector is lost.
    use(
        LEAVE_A_CHILD
        + "import time\nlauncher = os.getppid()\n"
        + "while os.getppid() == launcher:\n    os.kill(launcher, signal.SIGINT)\n    time.sleep(3)\n"
    )
    # A shell's background job, as CI may be, ignores the signal; a user's command in the foreground does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            draw(shards)
    finally:
        signal.signal(signal.SIGINT, before)
    for name in ("worker-0False.pid", "child.pid"):
        assert wait_until(lambda name=name: is_gone(int((tmp_path / name).read_text())))
    assert not shards.requests.exists()


LAUNCH = """
import sys
from pathlib import Path
from spin_plugin.generation import launcher
from spin_plugin.generation.job import Job, Request
from spin_plugin.generation.shards import Shards

folder = Path(sys.argv[1])
launcher.WORKER = folder / "worker.py"
job = Job(0, {}, None, "abc", {}, 1, "def")
requests = lambda: iter([Request(0, "train", 0, [1], 4, 0)])
launcher.generate(job, Shards(folder / "synthetic"), requests, lambda: Path(sys.executable))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_worker_ends_when_the_launcher_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    """By the real `take_orders`; nobody is left to clean up."""
    real_worker = ROOT / "spin_plugin" / "generation" / "vllm_worker.py"
    write_worker(
        tmp_path,
        f"""
import importlib.util, threading
spec = importlib.util.spec_from_file_location("vllm_worker", {str(real_worker)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
threading.Thread(target=worker.take_orders, args=(worker.SimpleQueue(),), daemon=True).start()
{LEAVE_A_CHILD}
(folder / "running").write_text("")
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


# --- what the worker may know ------------------------------------------------------------------


def test_environment_of_training_and_secrets_stay_behind(
    use: Use, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_TOKEN goes along: vLLM may have to download a gated model."""
    kept = {
        "HF_TOKEN": "hf",
        "HF_HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "MY_PATH": "x",
    }
    left = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
        "MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "bf16", "TORCHELASTIC_RUN_ID": "1", "FSDP_VERSION": "2",
        "PYTHONPATH": "/training", "WANDB_API_KEY": "s", "OPENAI_API_KEY": "s", "AWS_SESSION_TOKEN": "s",
        "DB_PASSWORD": "s", "client_secret": "s",
    }  # fmt: skip
    for name, value in (kept | left).items():
        monkeypatch.setenv(name, value)
    use("(folder / 'environment').write_text(json.dumps(dict(os.environ)))\n" + ANSWER_ALL)
    draw(shards)
    seen = json.loads((tmp_path / "environment").read_text())
    assert {name: seen.get(name) for name in kept} == kept
    assert not seen.keys() & left.keys()
    assert seen["GLOO_SOCKET_IFNAME"] == "lo"  # vLLM's process group of one must not listen where others can reach it
    assert os.environ["WANDB_API_KEY"] == "s"


def test_worker_leads_a_session_of_its_own(use: Use, shards: Shards, tmp_path: Path) -> None:
    use("(folder / 'session').write_text(str(os.getsid(0) == os.getpgid(0) == os.getpid()))\n" + ANSWER_ALL)
    draw(shards)
    assert (tmp_path / "session").read_text() == "True"


# --- why it died -------------------------------------------------------------------------------

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
def test_root_cause_of_the_engine_is_told_with_advice(tmp_path: Path, raised: str, advice: str) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(ENGINE_DIED.format(cause=PREFIX + raised))
    cause = cause_of_death(log)
    assert cause.startswith(f"{raised}; ")
    assert advice in cause
    assert cause.endswith(f"; its log is {log}")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "it printed nothing"),
        ("\n  \n", "it printed nothing"),
        ("loading\nstill loading\n", "still loading"),
        ("Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'vllm'\n",
         "ModuleNotFoundError: No module named 'vllm'"),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error\nsee the documentation\n",
         "huggingface_hub.errors.GatedRepoError: 401 Client Error"),
        ("Traceback (most recent call last):\n  File x\n    assert x\nAssertionError\n", "AssertionError"),
    ],
)  # fmt: skip
def test_cause_of_death_without_advice(tmp_path: Path, text: str, cause: str) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(text)
    assert cause_of_death(log) == f"{cause}; its log is {log}"


def test_signal_wins_over_what_the_log_says(tmp_path: Path) -> None:
    """A warning of hours ago has not killed anybody."""
    log = tmp_path / "vllm.log"
    log.write_text("ValueError: Tokenizer not available\n")
    cause = cause_of_death(log, -signal.SIGKILL)
    assert cause.startswith("it was killed by signal 9 (Killed; out of memory?); lower vllm.gpu_memory_")
    assert cause_of_death(log, -signal.SIGTERM) == f"it was killed by signal 15 (Terminated); its log is {log}"


def test_what_vllm_only_warns_of_is_not_blamed(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "WARNING 11-22 12:00:09 [renderer.py:1] Chat template warmup failed\n"
        "WARNING 11-22 12:00:09 [renderer.py:1] Traceback (most recent call last):\n"
        "WARNING 11-22 12:00:09 [renderer.py:1] ValueError: Tokenizer not available\n"
        "bye\n"
    )
    assert cause_of_death(log, 1) == f"bye; its log is {log}"


def test_options_are_called_by_the_names_they_have_here(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "ValueError: Available memory on node 0 (8.1/23.4 GiB) on startup is less than desired CPU memory utilization "
        "(0.92, 21.6 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory "
        "reserved (despite its name). To resolve: decrease `--gpu-memory-utilization` (e.g. `--gpu-memory-utilization "
        "0.5`) or reduce CPU memory used by other processes.\n"
    )
    cause = cause_of_death(log, 1)
    assert "--gpu" not in cause
    assert "(0.92, 21.6 GiB).; free memory, or lower vllm.gpu_memory_utilization" in cause


def test_long_cause_is_cut_between_words(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("RuntimeError: " + "word " * 200)
    assert "word …; its log is " in cause_of_death(log, 1)


def test_cause_of_death_is_short_and_readable(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_bytes(b"\xff\xfe progress\r\nRuntimeError: " + b"x" * 5000 + b"\n" + b"shutting down\n" * 10)
    cause = cause_of_death(log)
    assert cause.startswith("RuntimeError: xxx")
    assert len(cause) < 400 + len(str(log))
