"""One judge process as its parent sees it: batches in, scores out, and a time limit."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from spin_plugin.judge.worker import MEMORY

START_TIMEOUT = 300.0  # seconds for the imports of the user's module
EXIT_TIMEOUT = 1.0  # seconds in which a process that has closed its pipe usually exits
POLL_INTERVAL = 0.02
# The environment of the user's function. A list of what is allowed, because secrets have any name.
ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV",
    "CONDA_PREFIX", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip
# One core each; the GPUs belong to vLLM.
FIXED_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Question(NamedTuple):
    """What the judge is asked: is the synthetic response as good as the real one?"""

    prompt: dict[str, Any]
    """`text`: the prompt as templated; `messages`: its chat messages, or None."""
    real: str
    synthetic: str


class Raised(Exception):  # noqa: N818 - a result, not an error of ours
    """The function raised an error or returned something that is not a score. The message is the error's last line."""


class Overran(Exception):  # noqa: N818
    """The process exceeded its time or memory, or died. The message says which."""


class JudgeProcess:
    """A process in its own session that calls the user's function."""

    def __init__(self) -> None:
        """Start it."""
        self._reap_lock = threading.Lock()
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        try:
            self._process = subprocess.Popen(
                # -m: modules of the working directory can be imported, as with `python -m`
                [sys.executable, "-m", "spin_plugin.judge.worker", str(requests), str(replies)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[requests, replies],
                env=environment(os.environ),
                start_new_session=True,
            )
        finally:
            os.close(requests)
            os.close(replies)
        os.set_blocking(self._requests, False)

    def load(self, function: str, kwargs: Mapping[str, Any]) -> str:
        """Load the function, given as `module:function`, and return the digest of the file that defines it.

        Raises:
            Raised: the function cannot be imported.
            Overran: the import takes too long or too much memory.
        """
        return self._exchange({"function": function, "kwargs": kwargs}, START_TIMEOUT)["source"]

    def scores(self, batch: Sequence[Question], seconds: float) -> list[float]:
        """Return one score for each question.

        Raises:
            Raised, Overran: the process has ended.
        """
        prompt, real, synthetic = (list(column) for column in zip(*batch, strict=True))
        return self._exchange({"prompt": prompt, "real": real, "synthetic": synthetic}, seconds)["scores"]

    def kill(self) -> None:
        """Kill the process group, with whatever the function has started. Does not wait; any thread may call it."""
        with self._reap_lock:
            if self._process.returncode is None:  # not reaped, so the group id cannot have been reused
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process group and wait for the process."""
        self.kill()
        with self._reap_lock:
            self._process.wait()
        os.close(self._requests)
        os.close(self._replies)

    def _exchange(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send one line and return the reply; ends the process if it does not reply as it should."""
        reply = self._send_and_receive((json.dumps({**request, "seconds": seconds}) + "\n").encode(), seconds)
        if reply is None:
            self.end()
            raise Overran(f"it took longer than {seconds:g} s")
        message = json.loads(reply) if reply.endswith(b"\n") else {}  # else it died before its end
        if not message:
            self._wait_for_exit()
        if message.keys() & {"source", "scores"}:
            return message
        self.end()
        if "raised" in message:
            raise Raised(message["raised"])
        raise Overran(f"it needed more than {MEMORY >> 30} GiB of memory" if message else self._fate())

    def _send_and_receive(self, request: bytes, seconds: float) -> bytes | None:
        """Return the reply, empty or incomplete if the process has died; None if time is up."""
        deadline, unsent, reply = time.monotonic() + seconds, memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_WRITE)
            selector.register(self._replies, selectors.EVENT_READ)
            while not reply.endswith(b"\n"):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    return None
                if self._replies in (key.fd for key, _ in ready):
                    if not (received := os.read(self._replies, 1 << 16)):
                        break
                    reply += received
                elif ready:
                    try:
                        unsent = unsent[os.write(self._requests, unsent) :]
                    except BrokenPipeError:  # it has died, and what it has replied is still to be read
                        unsent = unsent[:0]
                    if not unsent:
                        selector.unregister(self._requests)
        return bytes(reply)

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
        if code < 0:
            return f"it was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"it exited with code {code}"


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a judge process receives, from those of this process."""
    allowed = {name: value for name, value in variables.items() if name in ENVIRONMENT or name.startswith("LC_")}
    return allowed | FIXED_ENVIRONMENT
