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


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Lock a directory against other runs; the lock is released when its process exits.

    Raises:
        SpinError: another process holds the lock; names its host and pid.
    """
    owner = root / "run.lock.json"  # the lock owner, for the error message
    lock = FileLock(root / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SpinError(
            f"output_dir: {root} is in use by {_owner(owner)}; wait for it or stop it (if it no longer exists and the "
            f"file system kept its lock, delete {lock.lock_file})"
        ) from None
    try:
        write_atomically(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    """Describe the lock owner. Retries because the owner writes its file a moment after taking the lock."""
    for _ in range(30):
        with suppress(OSError, json.JSONDecodeError, KeyError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["host"] != socket.gethostname() or pid_exists(content["pid"]):
                return f"process {content['pid']} on {content['host']}"
        time.sleep(0.1)
    return "another process"
