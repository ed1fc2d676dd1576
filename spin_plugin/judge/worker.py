"""A judge process: calls the user's function. Needs only the standard library and what that function imports.

    python -m spin_plugin.judge.worker REQUESTS REPLIES   # file descriptors, JSON lines

    in:  {"function": "module:function", "kwargs": {...}, "seconds": s}, then one line per batch:
         {"prompt": [...], "real": [...], "synthetic": [...], "seconds": s}
    out: {"source": digest of the function's file}, then one line per batch: {"scores": [...]}
         or, before the process ends: {"raised": error} or {"memory": true}

The function's own output is discarded: only the replies' descriptor is read.
"""

import hashlib
import json
import math
import os
import pkgutil
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

# RLIMIT_DATA instead of RLIMIT_AS: it counts the memory that a process can write to. torch and numpy reserve many times
# as much address space as they use.
MEMORY = 4 << 30  # bytes
LONGEST_ERROR = 300  # characters
ORPHANED = 5.0  # seconds after which a process overruns its time limit only if nobody is left to kill it


def main(requests: int, replies: int) -> None:
    """Serve until the other end of `requests` is closed."""
    for descriptor in (requests, replies):
        os.set_inheritable(descriptor, False)
    _limit(resource.RLIMIT_DATA, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    sys.excepthook = _reporter(replies)
    with open(requests, encoding="utf-8") as lines:
        start = json.loads(lines.readline())
        _die_after(start["seconds"])
        function = pkgutil.resolve_name(start["function"])
        _reply(replies, {"source": _digest_of_source(function)})
        _die_after(0)
        for line in lines:
            batch = json.loads(line)
            _die_after(batch.pop("seconds"))
            returned = function(**batch, **start["kwargs"])
            _reply(replies, {"scores": scores(returned, len(batch["real"]))})
            _die_after(0)


def scores(returned: Iterable[Any], count: int) -> list[float]:
    """Return the function's result as `count` plain numbers.

    Raises:
        TypeError: a score is not a number.
        ValueError: there are more or fewer than `count`, or one is outside 0…1 or NaN.
    """
    found = list(returned)
    if len(found) != count:
        raise ValueError(f"{len(found)} scores returned for {count} responses")
    for score in found:
        if not hasattr(score, "__float__"):
            raise TypeError(f"score {score!r} is not a number")
        if math.isnan(score) or not 0 <= score <= 1:
            raise ValueError(f"score {float(score)} is not in 0…1")
    return [float(score) for score in found]


def _reply(replies: int, message: dict[str, Any]) -> None:
    os.write(replies, json.dumps(message).encode() + b"\n")


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _die_after(seconds: float) -> None:
    """Let the kernel end this process if it overruns its time limit and its parent, which does so first, is gone.

    0 disarms it.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + ORPHANED if seconds else 0)


def _digest_of_source(function: Any) -> str:
    """Return the digest of the file that defines the function; empty if there is none."""
    file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _reporter(replies: int) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """Return an excepthook that sends the last line of the error that ends this process."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, MemoryError):
            os.write(replies, b'{"memory": true}\n')
            return
        lines = "".join(traceback.format_exception_only(kind, error)).splitlines()
        last = next(line.strip() for line in reversed(lines) if line.strip())
        _reply(replies, {"raised": last[:LONGEST_ERROR]})

    return report


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # without waiting for threads that the function has started
