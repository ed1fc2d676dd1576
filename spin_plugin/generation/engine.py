"""One worker process: vLLM in its own interpreter and session."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

from spin_plugin.config.plain import SECRET_PARTS
from spin_plugin.console import warn
from spin_plugin.generation.diagnosis import diagnose_exit, is_about_the_adapter, is_short_of_memory

# Set by torchrun and accelerate; a child process would take itself for a rank of this training.
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
# For this Python. Axolotl's allocator setting (expandable segments) breaks vLLM's tensor parallelism.
TRAINING_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# gloo opens a port for every process group, even of one process; keep it off the network.
LOCAL_ONLY = {"GLOO_SOCKET_IFNAME": socket.if_indextoname(1)}

# Seconds without a heartbeat after which a worker counts as hung. A ready worker sends heartbeats between vLLM's steps;
# while it loads or downloads a model, new output in its log counts as a heartbeat.
HEARTBEAT_TIMEOUT = 600.0
LOADING_TIMEOUT = 3600.0
# Seconds to wait for a killed process. Freeing tens of GB takes a few; one that needs longer hangs in a driver.
EXIT_TIMEOUT = 60.0
POLL_INTERVAL = 0.05


class Engine:
    """A worker process and the requests in flight on it."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str], inbox: "Inbox") -> None:
        """Start the worker.

        Args:
            command: the worker's command line; the file descriptor for its responses is appended.
            log: file for its stdout and stderr.
            environment: variables to add to those of this process.
            inbox: receives every message of the worker, then None once it has exited.
        """
        self.log = log
        self.shards: set[int] = set()
        """Shards submitted and not written yet."""
        self.in_flight = 0
        """Requests submitted and not answered yet."""
        self.slots = 0
        """Requests it processes at a time; 0 until it is ready."""
        self.hung = False
        self._reap_lock, self._exited = threading.Lock(), threading.Event()
        self._last_heartbeat = time.monotonic()
        self._log_size = 0
        receiving, sending = os.pipe()
        try:
            with open(log, "w", encoding="utf-8") as output:
                self.process = subprocess.Popen(
                    [*command, str(sending)],
                    stdin=subprocess.PIPE,
                    bufsize=0,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[sending],
                    env=LOCAL_ONLY | _environment() | dict(environment),
                    start_new_session=True,
                )
        finally:
            os.close(sending)
        threading.Thread(target=self._listen, args=(receiving, inbox), daemon=True).start()
        threading.Thread(target=self._reap, daemon=True).start()

    @property
    def ready(self) -> bool:
        return self.slots > 0

    def set_ready(self, slots: int) -> None:
        """Record that the model is loaded."""
        self.slots = slots
        self.heartbeat()

    def submit(self, shard: int, requests: Path, count: int) -> None:
        """Add a shard to the requests in flight."""
        assert self.process.stdin is not None
        if not self.in_flight:
            self.heartbeat()  # an idle worker sends none
        self.shards.add(shard)
        self.in_flight += count
        with suppress(BrokenPipeError):  # it has just exited; the dispatcher requeues its shards
            self.process.stdin.write(f"{requests}\n".encode())

    def heartbeat(self) -> None:
        """Record a heartbeat."""
        self._last_heartbeat = time.monotonic()

    def kill_if_hung(self) -> None:
        """Kill the worker if its last heartbeat is too old."""
        if self.ready and not self.in_flight:
            return
        if not self.ready and (size := self.log.stat().st_size) != self._log_size:
            self._log_size = size
            self.heartbeat()
        if time.monotonic() - self._last_heartbeat > (HEARTBEAT_TIMEOUT if self.ready else LOADING_TIMEOUT):
            self.hung = True
            self.kill()

    def kill(self) -> None:
        """Kill the process group, because vLLM's engine process would outlive the worker. Does not wait."""
        with self._reap_lock:
            if self.process.returncode is None:  # not reaped, so the group id cannot have been reused
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process group and wait until its memory is free."""
        self.kill()
        if not self._exited.wait(EXIT_TIMEOUT):
            left = ", ".join(map(str, _members(self.process.pid)))
            warn(
                f"vLLM was killed, but its processes {left} are still running after {EXIT_TIMEOUT:.0f} s and may hold "
                "memory; find out what blocks them (nvidia-smi, ps)"
            )

    def diagnosis(self) -> str:
        """Return why the worker exited."""
        if not self.hung:
            return diagnose_exit(self.log, self.process.returncode)
        sign, seconds = ("heartbeat", HEARTBEAT_TIMEOUT) if self.ready else ("output while loading", LOADING_TIMEOUT)
        return f"killed after {seconds:,.0f} s without {sign}; see {self.log}"

    @property
    def may_fit_with_less_memory(self) -> bool:
        """Whether a retry with less memory can help; it cannot if vLLM refused to start."""
        return self.ready or self.hung or (self.process.returncode or 0) < 0 or is_short_of_memory(self.diagnosis())

    @property
    def adapter_not_served(self) -> bool:
        """Whether it exited because vLLM cannot serve the adapter."""
        return not self.hung and is_about_the_adapter(self.diagnosis())

    def _listen(self, receiving: int, inbox: "Inbox") -> None:
        with open(receiving, encoding="utf-8") as messages:
            for line in messages:
                if line.endswith("\n"):  # else it was killed in the middle of a message
                    inbox.put((self, json.loads(line)))
        self._exited.wait(EXIT_TIMEOUT)  # until then the log and the exit status are incomplete
        inbox.put((self, None))

    def _reap(self) -> None:
        """Wait for the worker to exit, kill its process group (vLLM's engine holds GPU memory and the pipe), then reap
        it. Nothing else reaps it, because the system may reuse the process and group ids from then on."""
        pid = self.process.pid
        with suppress(ChildProcessError):  # if SIGCHLD is ignored, the system reaps it
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            self.kill()
            while _members(pid):
                time.sleep(POLL_INTERVAL)
        with self._reap_lock:
            self.process.wait()
        self._exited.set()


Inbox = SimpleQueue[tuple[Engine, dict[str, Any] | None]]


def _members(group: int) -> list[int]:
    """Return the processes of a group that may hold memory; a zombie holds none once its last thread has ended."""
    members = []
    for pid in psutil.pids():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(pid) == group:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
                    members.append(pid)
    return members


def without_launcher() -> dict[str, str]:
    """Return this process's environment without what torchrun or accelerate set for its rank."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(LAUNCHER_PREFIXES)
    }


def _environment() -> dict[str, str]:
    """Return this process's environment without training variables and secrets."""
    return {
        key: value
        for key, value in without_launcher().items()
        if key not in TRAINING_VARIABLES
        and (key.startswith(("HF_", "HUGGING_FACE_HUB_")) or not any(part in key.lower() for part in SECRET_PARTS))
    }
