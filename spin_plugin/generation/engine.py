"""One worker process: vLLM in its own interpreter, in a session of its own."""

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

# Set by torchrun, accelerate and Axolotl for training; vLLM would take them for its own. Axolotl's choice of an
# allocator (expandable segments) breaks vLLM's tensor parallelism.
TRAINING_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
# torch.distributed's gloo listens on a port for each group, also for a group of one process: not where others see it.
LOCAL_ONLY = {"GLOO_SOCKET_IFNAME": socket.if_indextoname(1)}
TRAINING_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")

# Seconds without a sign of life after which a worker counts as hanging. A worker at work gives one after every step
# of vLLM; one that loads a model (or downloads it) gives none but the growth of its log.
PATIENCE = 600.0
LOADING_PATIENCE = 3600.0
# Seconds after which a killed process that is still there hangs in a driver; tens of GB take a few to be given back.
SECONDS_UNTIL_GONE = 60.0
SECONDS_BETWEEN_LOOKS = 0.05


class Engine:
    """A worker and what it was given to answer."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str], inbox: "Inbox") -> None:
        """Start it.

        Args:
            command: the worker's; the file descriptor for its answers is added at the end.
            log: where everything it prints goes.
            environment: variables besides those of this process.
            inbox: gets every answer, and None when there will be no more.
        """
        self.log = log
        self.shards: set[int] = set()
        """Handed out and not complete."""
        self.in_flight = 0
        """Requests handed out and not answered."""
        self.slots = 0
        """How many requests it answers at a time; 0 until it is ready."""
        self.hung = False
        self._reaping, self._gone = threading.Lock(), threading.Event()
        self._heard = time.monotonic()
        self._log_size = 0
        receiving, sending = os.pipe()
        try:
            with open(log, "w", encoding="utf-8") as printed:
                self.process = subprocess.Popen(
                    [*command, str(sending)],
                    stdin=subprocess.PIPE,
                    bufsize=0,
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                    pass_fds=[sending],
                    env=LOCAL_ONLY | _environment() | dict(environment),
                    start_new_session=True,
                )
        finally:
            os.close(sending)
        threading.Thread(target=self._listen, args=(receiving, inbox), daemon=True).start()
        threading.Thread(target=self._clear_up, daemon=True).start()

    @property
    def ready(self) -> bool:
        return self.slots > 0

    def set_ready(self, slots: int) -> None:
        """It has loaded the model."""
        self.slots = slots
        self.heartbeat()

    def submit(self, shard: int, requests: Path, count: int) -> None:
        """Have it answer a shard, too."""
        assert self.process.stdin is not None
        if not self.in_flight:
            self.heartbeat()  # it had nothing to answer
        self.shards.add(shard)
        self.in_flight += count
        with suppress(BrokenPipeError):  # it has just died; its shards are handed on when its answers end
            self.process.stdin.write(f"{requests}\n".encode())

    def heartbeat(self) -> None:
        """A sign of life came."""
        self._heard = time.monotonic()

    def kill_if_hung(self) -> None:
        """End it where no sign of life has come for too long; its answers then end by themselves."""
        if self.ready and not self.in_flight:
            return
        if not self.ready and (size := self.log.stat().st_size) != self._log_size:
            self._log_size = size
            self.heartbeat()
        if time.monotonic() - self._heard > (PATIENCE if self.ready else LOADING_PATIENCE):
            self.hung = True
            self.kill()

    def kill(self) -> None:
        """Kill the whole process group, for vLLM's engine would outlive the worker alone; do not wait for it."""
        with self._reaping:
            if self.process.returncode is None:  # not reaped: nobody else can have the group's number
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the whole process group, and wait until the memory that it held is free."""
        self.kill()
        if not self._gone.wait(SECONDS_UNTIL_GONE):
            left = ", ".join(map(str, _members(self.process.pid)))
            warn(
                f"vLLM was killed, and after {SECONDS_UNTIL_GONE:.0f} s its processes {left} still have not ended: the "
                "memory that they hold will be missing; look what keeps them (nvidia-smi, ps)"
            )

    def diagnosis(self) -> str:
        """Why it died."""
        if not self.hung:
            return diagnose_exit(self.log, self.process.returncode)
        doing, patience = ("answer", PATIENCE) if self.ready else ("sign of life while loading", LOADING_PATIENCE)
        return f"it gave no {doing} for {patience:,.0f} s and was ended; its log is {self.log}"

    @property
    def may_fit_with_less_memory(self) -> bool:
        """Whether another attempt can help: not where vLLM refused to start."""
        return self.ready or self.hung or (self.process.returncode or 0) < 0 or is_short_of_memory(self.diagnosis())

    @property
    def adapter_not_served(self) -> bool:
        """Whether it died of the adapter: then it can draw from the merged model."""
        return not self.hung and is_about_the_adapter(self.diagnosis())

    def _listen(self, receiving: int, inbox: "Inbox") -> None:
        with open(receiving, encoding="utf-8") as answers:
            for line in answers:
                if line.endswith("\n"):  # else it was killed in the middle of an answer
                    inbox.put((self, json.loads(line)))
        self._gone.wait(SECONDS_UNTIL_GONE)  # its last words go to the log
        inbox.put((self, None))

    def _clear_up(self) -> None:
        """When the worker dies, end what it leaves (its engine holds the GPU's memory, and the pipe open), then reap
        it. Nobody else does: the number of a process that was reaped, and of its group, may be a stranger's."""
        pid = self.process.pid
        with suppress(ChildProcessError):  # where SIGCHLD is ignored the system has reaped it
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            self.kill()
            while _members(pid):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        with self._reaping:
            self.process.wait()
        self._gone.set()


Inbox = SimpleQueue[tuple[Engine, dict[str, Any] | None]]


def _members(group: int) -> list[int]:
    """The processes of a group that may still hold memory. A zombie holds none, once its last thread has ended."""
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(pid) == group:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
                    found.append(pid)
    return found


def _environment() -> dict[str, str]:
    """The worker's environment: ours without what belongs to training, and without secrets."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in TRAINING_VARIABLES
        and not key.startswith(TRAINING_PREFIXES)
        and (key.startswith(("HF_", "HUGGING_FACE_HUB_")) or not any(part in key.lower() for part in SECRET_PARTS))
    }
