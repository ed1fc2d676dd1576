"""One judge process as its parent sees it: batches in, scores out, and a time limit."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from spin_plugin.judge.worker import LONGEST_ERROR, MEMORY

START_TIMEOUT = 300.0  # seconds for the imports of the user's module, and for what its first call loads
EXIT_TIMEOUT = 1.0  # seconds in which a process that has closed its pipe usually exits
POLL_INTERVAL = 0.02
LONGEST_REPLY = 1 << 20  # bytes; the scores of a batch take less than a thousand
KEPT_ERRORS = 4096  # last bytes of stderr
# The environment of the user's function. A list of what is allowed, because secrets have any name.
ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV",
    "CONDA_PREFIX", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip
# One thread for OpenMP; the GPUs belong to vLLM.
FIXED_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Question(NamedTuple):
    """What the judge is asked: is the synthetic response as good as the real one?"""

    prompt: dict[str, Any]
    """`text`: the prompt as templated; `messages`: its chat messages, or None."""
    real: str
    synthetic: str


class Raised(Exception):  # noqa: N818 - a result, not an error of ours
    """The function raised an error or returned something that is not a score. The message is the error's last line."""


class BadKwargs(Raised):
    """The function does not accept its keyword arguments, or needs others."""


class Died(Exception):  # noqa: N818
    """The process exceeded its time or memory, exited or sent no proper reply. The message says which."""


class JudgeProcess:
    """A process in its own session that calls the user's function."""

    def __init__(self) -> None:
        """Start it."""
        self.called = False
        """Whether the function has been called before."""
        self._number, self._last_errors, self._reap_lock = 0, b"", threading.Lock()
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._errors, errors = os.pipe()
        try:
            self._process = subprocess.Popen(
                # -m: modules of the working directory can be imported, as with `python -m`
                [sys.executable, "-m", "spin_plugin.judge.worker", str(requests), str(replies)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[requests, replies],
                env=environment(os.environ),
                start_new_session=True,
            )
        finally:
            for descriptor in (requests, replies, errors):
                os.close(descriptor)
        for descriptor in (self._requests, self._errors):
            os.set_blocking(descriptor, False)

    def digests(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the digests of modules' files without importing them; empty for a module without a file.

        Raises:
            Raised, Died: the process has ended.
        """
        return self._exchange({"modules": [*modules]}, START_TIMEOUT, "digests")

    def load(self, function: str, kwargs: Mapping[str, Any]) -> dict[str, str]:
        """Load the function, given as `module:function`, and return the digests of the modules that define it.

        Raises:
            Raised: the function cannot be imported, or called with these keyword arguments.
            Died: the import takes too long or too much memory.
        """
        return self._exchange({"function": function, "kwargs": kwargs}, START_TIMEOUT, "digests")

    def scores(self, batch: Sequence[Question], seconds: float) -> list[float]:
        """Return one score for each question.

        Raises:
            Raised, Died: the process has ended.
        """
        self.called = True
        prompt, real, synthetic = (list(column) for column in zip(*batch, strict=True))
        return self._exchange({"prompt": prompt, "real": real, "synthetic": synthetic}, seconds, "scores")

    def kill(self) -> None:
        """Kill the process group, with whatever the function has started. Does not wait; any thread may call it."""
        with self._reap_lock:
            if self._process.returncode is None:  # not reaped, so the group id cannot have been reused
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process group and wait for the process; does nothing if it has ended."""
        if self._process.returncode is not None:
            return
        self.kill()
        with self._reap_lock:
            self._process.wait()
        for descriptor in (self._requests, self._replies, self._errors):
            os.close(descriptor)

    def _exchange(self, request: Mapping[str, Any], seconds: float, expected: str) -> Any:
        """Send one line and return what is `expected` in the reply; ends the process if it does not reply as it should.

        Requests are numbered, because processes that the function forks can write to the same pipe.
        """
        self._number += 1
        line = json.dumps({"number": self._number, **request}) + "\n"
        reply = self._send_and_receive(line.encode(), seconds)
        if reply is None:
            self.end()
            raise Died(f"it took longer than {round(seconds, 1):g} s")
        if not reply:
            self._wait_for_exit()
            self._read_errors()
            self.end()
            raise Died(self._fate())
        message = _parsed(reply)
        if message.get("number") == self._number and expected in message:
            return message[expected]
        self.end()
        if "bad_kwargs" in message:
            raise BadKwargs(message["bad_kwargs"])
        if "raised" in message:
            raise Raised(message["raised"])
        raise Died(
            f"it needed more than {MEMORY >> 30} GiB of memory"
            if "memory" in message
            else "its reply was garbled: only the judge may write to the pipe of its replies"
        )

    def _send_and_receive(self, request: bytes, seconds: float) -> bytes | None:
        """Return the reply, empty if the process has died before its end; None if time is up."""
        deadline, unsent, reply = time.monotonic() + seconds, memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_WRITE)
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(self._errors, selectors.EVENT_READ)
            while not reply.endswith(b"\n") and len(reply) < LONGEST_REPLY:
                ready = {key.fd for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                if time.monotonic() >= deadline and self._replies not in ready:
                    return None
                if self._errors in ready and not self._read_errors():
                    selector.unregister(self._errors)  # closed by the function
                if self._replies in ready:
                    if not (received := os.read(self._replies, 1 << 16)):
                        return b""
                    reply += received
                elif self._requests in ready:
                    try:
                        unsent = unsent[os.write(self._requests, unsent) :]
                    except BrokenPipeError:  # it has died, and what it has replied is still to be read
                        unsent = unsent[:0]
                    if not unsent:
                        selector.unregister(self._requests)
        return bytes(reply)

    def _read_errors(self) -> bool:
        """Read what the process has written to stderr and keep the end; False if stderr is closed."""
        with suppress(BlockingIOError):
            received = os.read(self._errors, 1 << 16)
            self._last_errors = (self._last_errors + received)[-KEPT_ERRORS:]
            return bool(received)
        return True

    def _wait_for_exit(self) -> None:
        """Wait for a process that has closed its pipe, so that it is not killed before its exit status is known."""
        deadline = time.monotonic() + EXIT_TIMEOUT
        with suppress(ChildProcessError):  # if SIGCHLD is ignored, the system reaps it
            while time.monotonic() < deadline:
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    return
                time.sleep(POLL_INTERVAL)

    def _fate(self) -> str:
        code = self._process.returncode
        fate = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exited with code {code}"
        lines = self._last_errors.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"it {fate}{f': {last[-LONGEST_ERROR:]}' if last else ''}"


def _parsed(reply: bytes) -> dict[str, Any]:
    """Return a reply; empty if it is not one object."""
    with suppress(ValueError, RecursionError):
        message = json.loads(reply)
        return message if isinstance(message, dict) else {}
    return {}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a judge process receives, from those of this process."""
    allowed = {name: value for name, value in variables.items() if name in ENVIRONMENT or name.startswith("LC_")}
    return allowed | FIXED_ENVIRONMENT
