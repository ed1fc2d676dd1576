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

OWNER = "run.lock.json"  # describes the holder, for the error message


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Lock a directory against other runs; the lock is released when its process exits.

    Raises:
        SpinError: another process holds the lock; names its host and pid.
    """
    owner = root / OWNER
    lock = FileLock(root / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SpinError(
            f"output_dir: {root} is in use by {_holder_of(root)}; wait for it or stop it (if it no longer exists and "
            f"the file system kept its lock, delete {lock.lock_file})"
        ) from None
    try:
        write_atomically(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def holder(root: Path) -> str | None:
    """Describe the process that holds a directory's lock, as far as its own file says, without touching the lock."""
    with suppress(OSError, json.JSONDecodeError, KeyError):
        content = json.loads((root / OWNER).read_text(encoding="utf-8"))
        if content["host"] != socket.gethostname() or pid_exists(content["pid"]):
            return f"process {content['pid']} on {content['host']}"
    return None


def _holder_of(root: Path) -> str:
    """Describe the holder. Retries because it writes its file a moment after taking the lock."""
    for _ in range(30):
        if found := holder(root):
            return found
        time.sleep(0.1)
    return "another process"
