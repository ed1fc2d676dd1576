"""Processes that train together: they wait for each other, and where one is gone the others end in one line.

No launcher is there to end them: what is tested is the plugin itself, in real processes without torch.
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
from spin_plugin.run.processes import GO_ON, Ranks

# A rank of three. It prints what it does, then does what a line of its input says.
RANK = """
import os, subprocess, sys, time
from pathlib import Path
from spin_plugin.run import processes
from spin_plugin.run.directory import RunDir

processes.SECONDS_BETWEEN_LOOKS = 0.05
{changes}
ranks = processes.Ranks(RunDir(Path({run!r})), {start!r})
ranks.join()
if processes.rank() == 0:
    ranks.forget_earlier_starts()
print("joined", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
HELPER = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)"
FORKED = "pid = os.fork() or (print('forked', flush=True), time.sleep(300)); print(pid, flush=True)"
FAILS_IN_A_COLLECTIVE = "raise RuntimeError('[pair.cc:544] Connection closed by peer [127.0.0.1]:41037')"


class Rank:
    """One process of a start."""

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

    def told(self, command: str) -> "Rank":
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self

    def does(self, command: str) -> None:
        done = self.lines.count("done") + 1
        self.told(command).wait_for("done", done)

    def ends_in_one_line(self, code: int = 1) -> str:
        """What it says after its last line of output."""
        known = {"joined", "done", ""}
        assert self.process.wait(60) == code, self.lines
        (line,) = [line for line in self.lines if line not in known]
        assert line.startswith(f"spin: error: process {self.number} of 0…2 ends: "), line
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., list[Rank]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start some of three ranks."""
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


def test_a_process_that_is_killed_ends_the_others_in_one_line(start: Start) -> None:
    """Nobody knows where they are: nothing that one of them has started may live on."""
    first, second, third = start()
    third.does(HELPER)
    family = third.process.children(recursive=True)
    assert len(family) == 2, "its witness and its helper"
    began = time.monotonic()
    second.kill()
    for rank in (first, third):
        assert rank.ends_in_one_line().endswith(f"process 1 is gone (killed, unless its output says why); {GO_ON}")
    assert time.monotonic() - began < 60, "the promise of docs/guide.md"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_process_that_fails_ends_the_others(start: Start) -> None:
    first, second, third = start()
    first.told("raise SystemExit(1)")
    assert first.process.wait(60) == 1
    for rank in (second, third):
        assert "process 0 is gone" in rank.ends_in_one_line()


def test_a_process_that_leaves_is_not_missed(start: Start) -> None:
    """The others go on for many looks, one of them to its own end, and a third is still watched."""
    first, second, third = start()
    for rank in (second, third):
        rank.does("ranks.signal_saved(); ranks.leave()")
    second.told("raise SystemExit(0)")
    assert second.process.wait(60) == 0
    third.kill()
    first.does("ranks.wait_for_saved(); time.sleep(2)")
    assert first.lines == ["joined", "done"]
    assert sorted(path.name for path in first.log.parent.glob("run/.waiting/start/*")) == [
        "0.alive", "1.saved", "2.saved",
    ]  # fmt: skip


def test_a_lost_machine_is_found_out_by_its_silence(start: Start) -> None:
    """Its witness is gone with it. The first process says so, and whoever hears only of that one ends, too."""
    first, second, third = start(changes="processes.LOOKS_BETWEEN_HEARTBEATS = 2; processes.PATIENCE = 70")
    time.sleep(8.0)  # its patience is 7 s, and a witness gives a sign every 5
    assert [rank.process.poll() for rank in (first, second, third)] == [None, None, None]
    for process in [second.process, *second.process.children()]:
        process.suspend()
    assert "process 1 gives no sign of life any more" in first.ends_in_one_line()
    assert "process 0 is gone" in third.ends_in_one_line()


def test_a_node_that_does_not_share_the_run_directory_says_so(start: Start) -> None:
    (alone,) = start(numbers=(1,), changes="processes.LOOKS_BETWEEN_HEARTBEATS = 1; processes.PATIENCE_AT_START = 5")
    said = alone.ends_in_one_line()
    assert "is not the one that process 0 works in; it must lie on a file system that all nodes share" in said


def test_a_launcher_that_ends_a_process_is_answered_in_one_line(start: Start) -> None:
    """As torchrun ends the others; what the process has forked does not take that for itself."""
    first, *_ = start()
    first.told(FORKED).wait_for("forked")
    (fork,) = [child for child in first.process.children() if "heartbeat" not in " ".join(child.cmdline())]
    fork.terminate()
    fork_ended = time.monotonic() + 60
    while fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < fork_ended
        time.sleep(0.01)
    assert first.process.poll() is None
    first.does("print('done', flush=True)")
    first.process.terminate()
    assert first.process.wait(60) == 128 + signal.SIGTERM
    said = [line for line in first.lines if line.startswith("spin: ")]
    assert len(said) == 1
    assert "its launcher told it to (SIGTERM)" in said[0]


def test_an_error_that_another_process_has_caused_is_told_as_that(start: Start) -> None:
    """The collective fails before anybody can know why."""
    first, second, third = start()
    first.told(FAILS_IN_A_COLLECTIVE)
    time.sleep(1)
    assert first.process.poll() is None
    second.kill()
    assert "process 1 is gone" in first.ends_in_one_line()
    third.process.wait(60)


def test_an_error_of_its_own_is_shown_as_it_is(start: Start) -> None:
    (first, *_) = start(changes="processes.SECONDS_UNTIL_SEEN = 0.0")
    first.told(FAILS_IN_A_COLLECTIVE)
    assert first.process.wait(60) == 1
    assert first.lines[-1].startswith("RuntimeError: [pair.cc")
    (second,) = start("another", (0,))
    second.told("raise RuntimeError('CUDA out of memory')")
    assert second.process.wait(10) == 1, "it waits for nobody"


def test_what_another_start_left_or_does_counts_for_nothing(start: Start, tmp_path: Path) -> None:
    """Neither what lies there, nor a second start by mistake that fails, as the directory is in use."""
    earlier = tmp_path / "run/.waiting/earlier"
    earlier.mkdir(parents=True)
    (earlier / "1.gone").touch()
    first, second, third = start()
    assert not earlier.exists()
    by_mistake = start("mistake", (1, 2))
    by_mistake[0].kill()
    assert "process 1 is gone" in by_mistake[1].ends_in_one_line()
    first.does("ranks.signal_prepared()")
    for rank in (second, third):
        rank.does("ranks.wait_for_prepared()")
    assert [rank.process.poll() for rank in (first, second, third)] == [None, None, None]


def test_nobody_goes_on_in_a_directory_that_another_start_has_taken_over(start: Start) -> None:
    """The first process's machine was lost, the lock fell, and the command was run again."""
    (old,) = start("old", (1,))
    start("new", (0,))
    assert "another start works in" in old.ends_in_one_line()


def test_others_wait_until_the_first_has_prepared(start: Start) -> None:
    first, second, third = start()
    for rank in (second, third):
        rank.told("ranks.wait_for_prepared()")
    time.sleep(0.5)
    assert second.lines == third.lines == ["joined"]
    first.does("ranks.signal_prepared()")
    for rank in (second, third):
        rank.wait_for("done")


def test_the_first_process_waits_until_the_others_have_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("spin_plugin.run.processes.SECONDS_UNTIL_SAVED", 0.0)
    ranks = Ranks(RunDir(tmp_path), "start")
    ranks.directory.mkdir(parents=True)
    monkeypatch.setenv("RANK", "1")
    ranks.signal_saved()
    with pytest.raises(SpinError, match="only 1 of 2 other processes have saved"):
        ranks.wait_for_saved()
    monkeypatch.setenv("RANK", "2")
    ranks.signal_saved()
    ranks.wait_for_saved()


def test_a_process_alone_has_nobody_to_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks(RunDir(tmp_path), "start")
    ranks.join()
    ranks.signal_prepared()
    ranks.wait_for_saved()
    ranks.leave()
    assert not list(tmp_path.iterdir())
