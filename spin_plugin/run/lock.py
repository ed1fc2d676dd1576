"""The run directory's lock: one command at a time."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from psutil import pid_exists

from spin_plugin.console import SpinError
from spin_plugin.run.atomic import write_atomically

RUN, ALL_ITERATIONS = "run", "all-iterations"


@contextmanager
def locked(root: Path, name: str = RUN) -> Iterator[None]:
    """Lock a directory against other runs; the lock is released when its process exits.

    Args:
        root: the directory.
        name: `RUN` while an iteration runs; `ALL_ITERATIONS` for the command that starts one after another, so that no
            second one takes over between two of them.

    Raises:
        SpinError: another process holds the lock; names its host and pid.
    """
    owner = _owner(root, name)
    lock = FileLock(root / f"{name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SpinError(
            f"output_dir: {root} is in use by {_holder_of(root, name)}; wait for it or stop it (if it no longer exists "
            f"and the file system kept its lock, delete {lock.lock_file})"
        ) from None
    try:
        write_atomically(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(root: Path, name: str) -> Path:
    """Return the file that describes the holder, for the error message."""
    return root / f"{name}.lock.json"


def holder(root: Path, name: str = RUN) -> str | None:
    """Describe the process that holds a directory's lock, as far as its own file says, without touching the lock."""
    with suppress(OSError, json.JSONDecodeError, KeyError):
        content = json.loads(_owner(root, name).read_text(encoding="utf-8"))
        if content["host"] != socket.gethostname() or pid_exists(content["pid"]):
            return f"process {content['pid']} on {content['host']}"
    return None


def _holder_of(root: Path, name: str) -> str:
    """Describe the holder. Retries because it writes its file a moment after taking the lock."""
    for _ in range(30):
        if found := holder(root, name):
            return found
        time.sleep(0.1)
    return "another process"
