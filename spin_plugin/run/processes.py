"""Coordination of the ranks: rank 0 prepares and finishes an iteration, the others wait for it.

They synchronize through files in the run directory because a collective would time out while vLLM generates for hours:

    .barrier/START/         one directory per start, so that files of an earlier start are ignored
      0.alive, 1.alive …    touched by each rank's heartbeat process while the rank is alive
      1.gone                renamed from 1.alive by the heartbeat process if the rank exits without leaving
      prepared              rank 0 has prepared the iteration
      1.saved               this rank has saved its files

Each rank watches the others. When one exits early, training cannot continue, and the others exit with a one-line error.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from spin_plugin.console import SpinError, report_error
from spin_plugin.run import heartbeat
from spin_plugin.run.directory import RunDir

LAUNCHERS = {"accelerate", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}
HEARTBEAT = str(Path(heartbeat.__file__))
POLL_SECONDS = 0.5
POLLS_PER_HEARTBEAT_CHECK = 10
# Timeouts in heartbeat checks, not seconds: after a suspension, a machine must not consider the others dead.
MAX_MISSED_HEARTBEATS = 12  # one minute; only a lost machine misses them, a rank's exit is reported at once
MAX_MISSED_AT_START = 60  # five minutes; all ranks start together
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
SAVE_TIMEOUT = 1800.0
PEER_EXIT_TIMEOUT = 30.0  # seconds; a collective can raise before the watcher sees the exit that broke it
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # shell convention
PEER_ERROR = re.compile(r"gloo|nccl|peer|connection|broken pipe|timed? ?out|socket", re.IGNORECASE)
RERUN = "rerun the same command to continue from what is on disk"
TERMINATED = f"SIGTERM from the launcher, usually because another rank failed; {RERUN}"


def rank() -> int:
    """Return this process's rank."""
    return int(os.environ.get("RANK", "0"))


def others() -> int:
    """Return the number of other ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) - 1


def shared_start_id() -> str:
    """Return a name shared by exactly the ranks of this start.

    Raises:
        SpinError: the rendezvous failed.
    """
    if not others():
        return uuid.uuid4().hex
    try:
        store = _rendezvous_store()
        if rank() == 0:
            store.set("spin-start", uuid.uuid4().hex)
        return str(store.get("spin-start").decode())
    except RuntimeError as error:
        raise SpinError(f"rendezvous of the ranks failed ({error}); {RERUN}") from None


@cache  # rank 0 hosts the store, so it must stay alive
def _rendezvous_store() -> Any:
    """Return the store that torch.distributed will use later. Creates no process group, which would occupy GPU memory
    that vLLM needs."""
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    return store


class Ranks:
    """The ranks of one start, as seen from this one."""

    def __init__(self, run: RunDir, start: str) -> None:
        self.run, self.directory = run, run.barrier / start
        self._pid = os.getpid()
        self.left = threading.Event()
        """Set once this rank no longer depends on the others, nor they on it."""
        self._terminated = False
        self._beats: dict[int, int] = {}
        self._missed: Counter[int] = Counter()
        """Heartbeat checks since each other rank's last heartbeat."""

    def __str__(self) -> str:
        return f"rank {rank()} of {others() + 1}"

    # --- joining and leaving -----------------------------------------------------------------

    def join(self) -> None:
        """Start this rank's heartbeat and watch the others: if one exits, so does this rank, with a one-line error."""
        if not others():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        alive, gone = self._alive(rank()), self.directory / f"{rank()}.gone"
        alive.touch()
        # in its own session, to survive a launcher that kills its process group
        command = [sys.executable, "-I", "-S", HEARTBEAT, str(alive), str(gone), str(os.getpid())]
        self._heartbeat = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        threading.Thread(target=self._watch, daemon=True).start()
        if threading.current_thread() is threading.main_thread():  # a Ray worker trains in another thread
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        sys.excepthook = self._after_watcher(sys.excepthook)

    def remove_earlier_starts(self) -> None:
        """Remove the files of earlier starts; called by rank 0 once it holds the lock."""
        for directory in self.run.barrier.glob("*"):
            if directory != self.directory:
                shutil.rmtree(directory, ignore_errors=True)

    def leave(self) -> None:
        """Stop the heartbeat and the watcher: from now on, any rank may exit."""
        if not others():
            return
        self.left.set()
        self._heartbeat.kill()
        self._heartbeat.wait()
        self._alive(rank()).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    # --- barriers ----------------------------------------------------------------------------

    def signal_prepared(self) -> None:
        """Release the ranks in `wait_for_prepared`."""
        if others():
            (self.directory / "prepared").touch()

    def wait_for_prepared(self) -> None:
        """Block until rank 0 has prepared the iteration."""
        while not (self.directory / "prepared").exists():
            time.sleep(POLL_SECONDS)

    def signal_saved(self) -> None:
        """Report that this rank has saved its files: Axolotl has every rank write the tokenizer, without a barrier."""
        (self.directory / f"{rank()}.saved").touch()

    def wait_for_saved(self) -> None:
        """Block until all other ranks have saved, so that rank 0 can check the model.

        Raises:
            SpinError: a rank has not saved before the timeout.
        """
        started = time.monotonic()
        while (saved := len(list(self.directory.glob("*.saved")))) < others():
            if time.monotonic() - started > SAVE_TIMEOUT:
                raise SpinError(f"only {saved} of {others()} other ranks saved within {SAVE_TIMEOUT:.0f} s; {RERUN}")
            time.sleep(POLL_SECONDS)

    # --- watcher -----------------------------------------------------------------------------

    def _alive(self, number: int) -> Path:
        return self.directory / f"{number}.alive"

    def _watch(self) -> None:
        """Exit this process after SIGTERM or when another rank has exited."""
        for poll in count():
            if self.left.wait(POLL_SECONDS):
                return
            reason = self._find_exited() or (None if poll % POLLS_PER_HEARTBEAT_CHECK else self._find_silent())
            if self.left.is_set():  # set during the check
                return
            if reason:
                exit_with_error(f"{self} stopped: {reason}", 1)
            if self._terminated:
                exit_with_error(f"{self} stopped: {TERMINATED}", SIGTERM_EXIT_CODE)

    def _find_exited(self) -> str | None:
        try:
            gone = [file for file in os.scandir(self.directory) if file.name.endswith(".gone")]
            # report the oldest: later exits may be reactions to the first
            first = min(gone, key=lambda file: file.stat().st_ctime_ns, default=None)
        except FileNotFoundError:
            return f"output_dir: another start is using {self.run.root}; wait for it or stop it"
        except OSError:  # a network file system can be temporarily unavailable
            return None
        if first is None:
            return None
        return f"rank {first.name.removesuffix('.gone')} exited (killed, unless its log shows an error); {RERUN}"

    def _find_silent(self) -> str | None:
        """Check heartbeats: rank 0 checks all others; the others check only rank 0, which exits if any of them does."""
        for number in [0] if rank() else range(1, others() + 1):
            beat = _mtime(self._alive(number))
            if beat is None and number in self._beats:  # it has left, or the file system is unavailable
                continue
            self._missed[number] += 1
            if beat is not None and beat != self._beats.get(number):
                self._beats[number], self._missed[number] = beat, 0
            if number not in self._beats and self._missed[number] > MAX_MISSED_AT_START:
                return (
                    f"output_dir: {self.run.root} on {socket.gethostname()} is not the directory that rank {number} "
                    "uses; put it on a file system shared by all nodes"
                )
            if number in self._beats and self._missed[number] > MAX_MISSED_HEARTBEATS:
                return f"rank {number} sends no heartbeat (machine lost?); {RERUN}"
        return None

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Let the watcher exit, because the main thread can be blocked in a collective; a forked helper exits here."""
        if os.getpid() == self._pid:
            self._terminated = True
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _after_watcher(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Delay `hook` for errors of a broken collective, so that the watcher can report which rank exited."""

        def wait(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if issubclass(kind, RuntimeError) and PEER_ERROR.search(str(error)):
                self.left.wait(PEER_EXIT_TIMEOUT)
            hook(kind, error, trace)

        return wait


def _mtime(file: Path) -> int | None:
    """Return a file's mtime in ns, by the clock of the host that touched it, or None if it does not exist.

    Opens the file because that makes a network file system ask its server.
    """
    try:
        with open(file, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


# --- exiting -----------------------------------------------------------------------------------


def exit_with_error(reason: str, code: int) -> NoReturn:
    """Kill the children and exit with a one-line error. An exception's handlers could block on other ranks."""
    sys.stdout.write("\n")  # training's progress bar leaves its line open
    report_error(reason)
    sys.stdout.flush()
    devnull = os.open(os.devnull, os.O_WRONLY)  # killing vLLM may make the main thread print another error
    for descriptor in (1, 2):
        os.dup2(devnull, descriptor)
    _kill_children()
    os._exit(code)


def exit_with_launcher() -> None:
    """Exit with the launcher: a process that a killed `accelerate launch` leaves behind would keep the run locked."""
    if process := launcher():
        exit_with_parent(process.pid)


def exit_with_parent(parent: int) -> None:
    """Exit this process when its parent does."""
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def launcher() -> psutil.Process | None:
    """Return the process of `accelerate launch` or `torchrun` that started this one, if one did."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and LAUNCHERS & {Path(word).name for word in parent.cmdline()[:3]}:
            return parent
    return None


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    _kill_children()
    os._exit(1)


def _kill_children() -> None:
    """Kill vLLM's worker and helpers of `datasets`, but not the heartbeat, which reports this exit and then exits."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if HEARTBEAT not in child.cmdline():
                child.kill()
