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

from spin_plugin.generation.cause import cause_of_death, is_about_the_adapter, is_short_of_memory
from spin_plugin.run import SECRET_PARTS

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
        self.unanswered = 0
        """Requests handed out and not answered."""
        self.seats = 0
        """How many requests it answers at a time; 0 until it is ready."""
        self.hangs = False
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
        # vLLM forks its engine, which holds the pipe open: where the worker dies alone, end what it left.
        threading.Thread(target=self._clear_up, daemon=True).start()

    @property
    def ready(self) -> bool:
        return self.seats > 0

    def is_ready(self, seats: int) -> None:
        """It has loaded the model."""
        self.seats = seats
        self.lives()

    def give(self, shard: int, requests: Path, count: int) -> None:
        """Have it answer a shard, too."""
        assert self.process.stdin is not None
        if not self.unanswered:
            self.lives()  # it had nothing to answer
        self.shards.add(shard)
        self.unanswered += count
        with suppress(BrokenPipeError):  # it has just died; its shards are handed on when its answers end
            self.process.stdin.write(f"{requests}\n".encode())

    def lives(self) -> None:
        """A sign of life came."""
        self._heard = time.monotonic()

    def end_if_it_hangs(self) -> None:
        """End it where no sign of life has come for too long; its answers then end by themselves."""
        if self.ready and not self.unanswered:
            return
        if not self.ready and (size := self.log.stat().st_size) != self._log_size:
            self._log_size = size
            self.lives()
        if time.monotonic() - self._heard > (PATIENCE if self.ready else LOADING_PATIENCE):
            self.hangs = True
            self.end()

    def end(self) -> None:
        """End the whole process group; vLLM's engine would outlive the worker alone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def cause(self) -> str:
        """Why it died."""
        if not self.hangs:
            return cause_of_death(self.log, self.process.poll())
        doing, patience = ("answer", PATIENCE) if self.ready else ("sign of life while loading", LOADING_PATIENCE)
        return f"it gave no {doing} for {patience:,.0f} s and was ended; its log is {self.log}"

    @property
    def might_work_with_less_memory(self) -> bool:
        """Whether another attempt can help: not where vLLM refused to start."""
        return self.ready or self.hangs or (self.process.poll() or 0) < 0 or is_short_of_memory(self.cause())

    @property
    def cannot_serve_the_adapter(self) -> bool:
        """Whether it died of the adapter: then it can draw from the merged model."""
        return not self.hangs and is_about_the_adapter(self.cause())

    def _listen(self, receiving: int, inbox: "Inbox") -> None:
        with open(receiving, encoding="utf-8") as answers:
            for line in answers:
                if line.endswith("\n"):  # else it was killed in the middle of an answer
                    inbox.put((self, json.loads(line)))
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=60)  # its last words go to the log
        inbox.put((self, None))

    def _clear_up(self) -> None:
        self.process.wait()
        self.end()


Inbox = SimpleQueue[tuple[Engine, dict[str, Any] | None]]


def _environment() -> dict[str, str]:
    """The worker's environment: ours without what belongs to training, and without secrets."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in TRAINING_VARIABLES
        and not key.startswith(TRAINING_PREFIXES)
        and (key.startswith(("HF_", "HUGGING_FACE_HUB_")) or not any(part in key.lower() for part in SECRET_PARTS))
    }
