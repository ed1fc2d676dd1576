"""The processes that train together: the first one prepares and finishes an iteration, the others wait for it.

They meet by files in the run directory and not in a collective, which would time out while vLLM draws for hours:

    .waiting/START/         a directory for each start, so that nothing of an earlier one counts
      0.alive, 1.alive …    touched by each process's witness as long as the process lives
      1.gone                what the witness makes of it when the process ends before it has left in peace
      prepared              the first process has prepared the iteration
      1.saved               this process has saved what it saves

Each process watches the others. Where one is gone, training cannot go on: they end themselves in one line.
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
SECONDS_BETWEEN_LOOKS = 0.5
LOOKS_BETWEEN_HEARTBEATS = 10  # whether the others still give signs of life is looked at every so many looks
# Counted in these and not in seconds: a machine that stood still must not take the others for dead.
PATIENCE = 12  # a minute; it is a lost machine that falls silent, of a process that dies its witness tells at once
PATIENCE_AT_START = 60  # five minutes; all processes start together
TIME_TO_MEET = timedelta(minutes=10)
SECONDS_UNTIL_SAVED = 1800.0
SECONDS_UNTIL_SEEN = 30.0  # an error that another process's end has caused is raised before that end is seen
ENDED_BY_SIGNAL = 128 + signal.SIGTERM  # as a shell reports it
ANOTHER_PROCESS = re.compile(r"gloo|nccl|peer|connection|broken pipe|timed? ?out|socket", re.IGNORECASE)
GO_ON = "run the same command again, it goes on from what is on disk"
TOLD_TO_END = f"its launcher told it to (SIGTERM), as when another process has failed; {GO_ON}"


def rank() -> int:
    """This process's number among all that train together."""
    return int(os.environ.get("RANK", "0"))


def others() -> int:
    """How many processes train besides this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) - 1


def name_of_start() -> str:
    """A name that all processes of one start, and only they, share.

    Raises:
        SpinError: they do not find each other.
    """
    if not others():
        return uuid.uuid4().hex
    try:
        store = _meeting_point()
        if rank() == 0:
            store.set("spin-start", uuid.uuid4().hex)
        return str(store.get("spin-start").decode())
    except RuntimeError as error:
        raise SpinError(f"the processes of this start do not find each other ({error}); {GO_ON}") from None


@cache  # the first process hosts it, so it has to stay
def _meeting_point() -> Any:
    """Where torch.distributed will meet, too: its store, and no process group yet, which would take memory of the GPUs
    from vLLM."""
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(rendezvous("env://", timeout=TIME_TO_MEET))
    return store


class Ranks:
    """The processes of one start, and this one's place among them."""

    def __init__(self, run: RunDir, start: str) -> None:
        self.run, self.directory = run, run.waiting / start
        self._pid = os.getpid()
        self.left = threading.Event()
        """This process needs the others no longer, and they do not need it."""
        self._told_to_end = False
        self._beats: dict[int, int] = {}
        self._silent: Counter[int] = Counter()
        """Looks since each of the others' last sign of life."""

    def __str__(self) -> str:
        return f"process {rank()} of 0…{others()}"

    # --- coming and going --------------------------------------------------------------------

    def join(self) -> None:
        """Tell the others that this process lives, and end it in one line when one of them is gone."""
        if not others():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        alive, gone = self._alive(rank()), self.directory / f"{rank()}.gone"
        alive.touch()
        # in a session of its own: it has to outlive the group of processes that a launcher ends
        command = [sys.executable, "-I", "-S", HEARTBEAT, str(alive), str(gone), str(os.getpid())]
        self._heartbeat = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        threading.Thread(target=self._watch, daemon=True).start()
        if threading.current_thread() is threading.main_thread():  # a worker of Ray trains in another one
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        sys.excepthook = self._after_the_watch(sys.excepthook)

    def forget_earlier_starts(self) -> None:
        """Remove what they have left; the first process does this, once the run directory is its own."""
        for directory in self.run.waiting.glob("*"):
            if directory != self.directory:
                shutil.rmtree(directory, ignore_errors=True)

    def leave(self) -> None:
        """From now on this process may end, and the others may."""
        if not others():
            return
        self.left.set()
        self._heartbeat.kill()
        self._heartbeat.wait()
        self._alive(rank()).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    # --- waiting for each other --------------------------------------------------------------

    def signal_prepared(self) -> None:
        """Let the other processes go on."""
        if others():
            (self.directory / "prepared").touch()

    def wait_for_prepared(self) -> None:
        """What every process but the first does while that one prepares the iteration."""
        while not (self.directory / "prepared").exists():
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def signal_saved(self) -> None:
        """Another process has saved what it saves: Axolotl has each write the tokenizer, and does not wait."""
        (self.directory / f"{rank()}.saved").touch()

    def wait_for_saved(self) -> None:
        """The first process looks at the model when nobody writes any more.

        Raises:
            SpinError: another process does not come to its end.
        """
        started = time.monotonic()
        while (saved := len(list(self.directory.glob("*.saved")))) < others():
            if time.monotonic() - started > SECONDS_UNTIL_SAVED:
                raise SpinError(
                    f"only {saved} of {others()} other processes have saved after {SECONDS_UNTIL_SAVED:.0f} s; {GO_ON}"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    # --- watching each other -----------------------------------------------------------------

    def _alive(self, number: int) -> Path:
        return self.directory / f"{number}.alive"

    def _watch(self) -> None:
        """End this process when it is told to, or when another one is gone."""
        for look in count():
            if self.left.wait(SECONDS_BETWEEN_LOOKS):
                return
            reason = self._who_is_gone() or (None if look % LOOKS_BETWEEN_HEARTBEATS else self._who_is_silent())
            if self.left.is_set():  # while it looked
                return
            if reason:
                end_in_one_line(f"{self} ends: {reason}", 1)
            if self._told_to_end:
                end_in_one_line(f"{self} ends: {TOLD_TO_END}", ENDED_BY_SIGNAL)

    def _who_is_gone(self) -> str | None:
        try:
            gone = [file for file in os.scandir(self.directory) if file.name.endswith(".gone")]
            # the others end because of the first one, and may have done so before this one has looked
            first = min(gone, key=lambda file: file.stat().st_ctime_ns, default=None)
        except FileNotFoundError:
            return f"another start works in {self.run.root}; wait for it or stop it"
        except OSError:  # the file system may be away for a while
            return None
        if first is None:
            return None
        return f"process {first.name.removesuffix('.gone')} is gone (killed, unless its output says why); {GO_ON}"

    def _who_is_silent(self) -> str | None:
        """The first process looks at all others; they look at it alone, and hear from it of each other."""
        for number in [0] if rank() else range(1, others() + 1):
            sign = _time_of(self._alive(number))
            if sign is None and number in self._beats:  # it has left, or the file system is away
                continue
            self._silent[number] += 1
            if sign is not None and sign != self._beats.get(number):
                self._beats[number], self._silent[number] = sign, 0
            if number not in self._beats and self._silent[number] > PATIENCE_AT_START:
                return (
                    f"output_dir {self.run.root} on {socket.gethostname()} is not the one that process {number} works "
                    "in; it must lie on a file system that all nodes share"
                )
            if number in self._beats and self._silent[number] > PATIENCE:
                return f"process {number} gives no sign of life any more (is its machine lost?); {GO_ON}"
        return None

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """A collective may be what the main thread stands in, so the watch is told; a forked helper just ends."""
        if os.getpid() == self._pid:
            self._told_to_end = True
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _after_the_watch(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Where another process dies in a collective, an error is raised here: the watch knows better what happened."""

        def wait(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if issubclass(kind, RuntimeError) and ANOTHER_PROCESS.search(str(error)):
                self.left.wait(SECONDS_UNTIL_SEEN)
            hook(kind, error, trace)

        return wait


def _time_of(file: Path) -> int | None:
    """When a file was touched, by the clock of whoever touched it; None where it is not there.

    To open it makes a network file system ask its server.
    """
    try:
        with open(file, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


# --- ending ------------------------------------------------------------------------------------


def end_in_one_line(reason: str, code: int) -> NoReturn:
    """End this process and what it has started; not by an exception, for whoever catches it may wait for others."""
    sys.stdout.write("\n")  # training's progress bar leaves its line open
    report_error(reason)
    sys.stdout.flush()
    silence = os.open(os.devnull, os.O_WRONLY)  # the main thread may have to say that vLLM has died
    for descriptor in (1, 2):
        os.dup2(silence, descriptor)
    _end_children()
    os._exit(code)


def end_with_launcher() -> None:
    """End this process when the launcher that started it is gone.

    A killed `accelerate launch` leaves its process behind, which would go on unseen and keep the run locked.
    """
    launcher = os.getppid()
    with suppress(OSError):  # no /proc, no watch
        command = Path(f"/proc/{launcher}/cmdline").read_bytes().decode(errors="replace").split("\0")[:3]
        if LAUNCHERS & {Path(word).name for word in command}:
            threading.Thread(target=_end_after, args=(launcher,), daemon=True).start()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    _end_children()
    os._exit(1)


def _end_children() -> None:
    """vLLM's worker, and what `datasets` has started; the witness has to tell the others, and ends by itself."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if HEARTBEAT not in child.cmdline():
                child.kill()
