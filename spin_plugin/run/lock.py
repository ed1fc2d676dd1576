"""One command at a time works in a run directory."""

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
    """Keep every other run out of a directory; the lock falls with the process that holds it.

    Raises:
        SpinError: another live process works here; names its host and pid.
    """
    owner = root / "run.lock.json"  # who works here; lies there as long as somebody does
    lock = FileLock(root / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SpinError(
            f"output_dir {root} is in use by {_owner(owner)}; wait for it or stop it (where it is gone for good and "
            f"the file system cannot know, delete {lock.lock_file})"
        ) from None
    try:
        write_atomically(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    """Who holds the lock; its name appears, or replaces that of a dead process, a moment after it got the lock."""
    for _ in range(30):
        with suppress(OSError, json.JSONDecodeError, KeyError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["host"] != socket.gethostname() or pid_exists(content["pid"]):
                return f"process {content['pid']} on {content['host']}"
        time.sleep(0.1)
    return "another process"
