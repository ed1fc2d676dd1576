"""Ranks wait for each other, and when one exits, the others exit with a one-line error.

Real processes without torch and without a launcher, so only the plugin can stop them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from spin_plugin.console import SpinError
from spin_plugin.run.directory import RunDir
from spin_plugin.run.processes import RERUN, Ranks

# One of three ranks. Executes each line of stdin, then prints "done".
RANK = """
import os, subprocess, sys, time
from pathlib import Path
from spin_plugin.run import processes
from spin_plugin.run.directory import RunDir

processes.POLL_SECONDS = 0.05
{changes}
ranks = processes.Ranks(RunDir(Path({run!r})), {start!r})
ranks.join()
if processes.rank() == 0:
    ranks.remove_earlier_starts()
print("joined", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
HELPER = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)"
FORKED = "pid = os.fork() or (print('forked', flush=True), time.sleep(300)); print(pid, flush=True)"
FAILS_IN_A_COLLECTIVE = "raise RuntimeError('[pair.cc:544] Connection closed by peer [127.0.0.1]:41037')"


class Rank:
    """One rank of a start."""

    def __init__(self, directory: Path, number: int, start: str, changes: str) -> None:
        self.number = number
        self.log = directory / f"{start}-{number}.log"
        program = RANK.format(run=str(directory / "run"), start=start, changes=changes)
        variables = {"RANK": str(number), "WORLD_SIZE": "3", "PYTHONPATH": str(ROOT)}
        with open(self.log, "w") as log:
            self.process = psutil.Popen(
                [sys.executable, "-c", program],
                cwd=directory,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, line: str, times: int = 1) -> None:
        until = time.monotonic() + 60
        while self.lines.count(line) < times:
            assert time.monotonic() < until, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.01)

    def send(self, command: str) -> "Rank":
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self

    def run(self, command: str) -> None:
        done = self.lines.count("done") + 1
        self.send(command).wait_for("done", done)

    def exit_line(self, code: int = 1) -> str:
        """Return its error line after checking the exit code."""
        known = {"joined", "done", ""}
        assert self.process.wait(60) == code, self.lines
        (line,) = [line for line in self.lines if line not in known]
        assert line.startswith(f"spin: error: rank {self.number} of 3 stopped: "), line
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., list[Rank]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start some or all of the three ranks."""
    started: list[Rank] = []

    def start(name: str = "start", numbers: tuple[int, ...] = (0, 1, 2), changes: str = "") -> list[Rank]:
        new = [Rank(tmp_path, number, name, changes) for number in numbers]
        started.extend(new)
        for rank in new:
            rank.wait_for("joined")
        return new

    yield start
    for rank in started:
        with suppress(psutil.NoSuchProcess):
            for process in [rank.process, *rank.process.children(recursive=True)]:
                process.kill()


def test_killed_rank_stops_the_others(start: Start) -> None:
    """None of the processes that they started may keep running."""
    first, second, third = start()
    third.run(HELPER)
    children = third.process.children(recursive=True)
    assert len(children) == 2, "its heartbeat and its helper"
    began = time.monotonic()
    second.kill()
    for rank in (first, third):
        assert rank.exit_line().endswith(f"rank 1 exited (killed, unless its log shows an error); {RERUN}")
    assert time.monotonic() - began < 60, "documented in docs/guide.md"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_failing_rank_stops_the_others(start: Start) -> None:
    first, second, third = start()
    first.send("raise SystemExit(1)")
    assert first.process.wait(60) == 1
    for rank in (second, third):
        assert "rank 0 exited" in rank.exit_line()


def test_rank_that_leaves_does_not_stop_the_others(start: Start) -> None:
    """The others keep running for many polls, even after a rank that has left exits or is killed."""
    first, second, third = start()
    for rank in (second, third):
        rank.run("ranks.signal_saved(); ranks.leave()")
    second.send("raise SystemExit(0)")
    assert second.process.wait(60) == 0
    third.kill()
    first.run("ranks.wait_for_saved(); time.sleep(2)")
    assert first.lines == ["joined", "done"]
    assert sorted(path.name for path in first.log.parent.glob("run/.barrier/start/*")) == [
        "0.alive", "1.saved", "2.saved",
    ]  # fmt: skip


def test_lost_machine_is_detected_by_missing_heartbeats(start: Start) -> None:
    """Its heartbeat process is lost, too. Rank 0 reports it, and the other ranks exit because rank 0 did."""
    first, second, third = start(
        changes="processes.POLLS_PER_HEARTBEAT_CHECK = 2; processes.MAX_MISSED_HEARTBEATS = 70"
    )
    time.sleep(8.0)  # the timeout is 7 s, the heartbeat interval 5 s
    assert [rank.process.poll() for rank in (first, second, third)] == [None, None, None]
    for process in [second.process, *second.process.children()]:
        process.suspend()
    assert "rank 1 sends no heartbeat" in first.exit_line()
    assert "rank 0 exited" in third.exit_line()


def test_run_directory_that_is_not_shared_is_reported(start: Start) -> None:
    (alone,) = start(numbers=(1,), changes="processes.POLLS_PER_HEARTBEAT_CHECK = 1; processes.MAX_MISSED_AT_START = 5")
    said = alone.exit_line()
    assert "is not the directory that rank 0 uses; put it on a file system shared by all nodes" in said


def test_sigterm_from_the_launcher_gives_one_line(start: Start) -> None:
    """torchrun sends it to the other ranks. A forked helper that gets SIGTERM does not stop its rank."""
    first, *_ = start()
    first.send(FORKED).wait_for("forked")
    (fork,) = [child for child in first.process.children() if "heartbeat" not in " ".join(child.cmdline())]
    fork.terminate()
    fork_ended = time.monotonic() + 60
    while fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < fork_ended
        time.sleep(0.01)
    assert first.process.poll() is None
    first.run("print('done', flush=True)")
    first.process.terminate()
    assert first.process.wait(60) == 128 + signal.SIGTERM
    said = [line for line in first.lines if line.startswith("spin: ")]
    assert len(said) == 1
    assert "SIGTERM from the launcher" in said[0]


def test_collective_broken_by_another_rank_is_reported_as_its_exit(start: Start) -> None:
    """The collective fails before the watcher sees the exit."""
    first, second, third = start()
    first.send(FAILS_IN_A_COLLECTIVE)
    time.sleep(1)
    assert first.process.poll() is None
    second.kill()
    assert "rank 1 exited" in first.exit_line()
    third.process.wait(60)


def test_own_error_is_shown_unchanged(start: Start) -> None:
    (first, *_) = start(changes="processes.PEER_EXIT_TIMEOUT = 0.0")
    first.send(FAILS_IN_A_COLLECTIVE)
    assert first.process.wait(60) == 1
    assert first.lines[-1].startswith("RuntimeError: [pair.cc")
    (second,) = start("another", (0,))
    second.send("raise RuntimeError('CUDA out of memory')")
    assert second.process.wait(10) == 1, "other errors are not delayed"


def test_files_of_other_starts_are_ignored(start: Start, tmp_path: Path) -> None:
    """Files of an earlier start, and of a second one that fails because the directory is in use."""
    earlier = tmp_path / "run/.barrier/earlier"
    earlier.mkdir(parents=True)
    (earlier / "1.gone").touch()
    first, second, third = start()
    assert not earlier.exists()
    by_mistake = start("mistake", (1, 2))
    by_mistake[0].kill()
    assert "rank 1 exited" in by_mistake[1].exit_line()
    first.run("ranks.signal_prepared()")
    for rank in (second, third):
        rank.run("ranks.wait_for_prepared()")
    assert [rank.process.poll() for rank in (first, second, third)] == [None, None, None]


def test_rank_exits_when_another_start_takes_over_its_directory(start: Start) -> None:
    """The machine of rank 0 was lost, its lock was released, and the command was rerun."""
    (old,) = start("old", (1,))
    start("new", (0,))
    assert "another start is using" in old.exit_line()


def test_other_ranks_wait_until_rank_0_has_prepared(start: Start) -> None:
    first, second, third = start()
    for rank in (second, third):
        rank.send("ranks.wait_for_prepared()")
    time.sleep(0.5)
    assert second.lines == third.lines == ["joined"]
    first.run("ranks.signal_prepared()")
    for rank in (second, third):
        rank.wait_for("done")


def test_rank_0_waits_until_the_others_have_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("spin_plugin.run.processes.SAVE_TIMEOUT", 0.0)
    ranks = Ranks(RunDir(tmp_path), "start")
    ranks.directory.mkdir(parents=True)
    monkeypatch.setenv("RANK", "1")
    ranks.signal_saved()
    with pytest.raises(SpinError, match="only 1 of 2 other ranks saved"):
        ranks.wait_for_saved()
    monkeypatch.setenv("RANK", "2")
    ranks.signal_saved()
    ranks.wait_for_saved()


def test_single_process_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks(RunDir(tmp_path), "start")
    ranks.join()
    ranks.signal_prepared()
    ranks.wait_for_saved()
    ranks.leave()
    assert not list(tmp_path.iterdir())
