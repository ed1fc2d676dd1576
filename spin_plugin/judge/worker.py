"""A judge process: calls the user's function. Needs only the standard library and what that function imports.

    python -m spin_plugin.judge.worker REQUESTS REPLIES   # file descriptors, JSON lines

    in:  {"number": n, "modules": [...]}                                 digests of these modules' files
         {"number": n, "function": "module:function", "kwargs": {...}}   import it
         {"number": n, "prompt": [...], "real": [...], "synthetic": [...]}   call it
    out: {"number": n, "digests": {...}} to the first two, {"number": n, "scores": [...]} to the third, or
         {"number": n, "raised": error}, {"number": n, "bad_kwargs": error}, {"number": n, "memory": true}

The function's own output is no reply: stdout is discarded, and of stderr the parent keeps the end.
"""

import errno
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# RLIMIT_DATA instead of RLIMIT_AS: it counts the memory that a process can write to. torch and numpy reserve many times
# as much address space as they use.
MEMORY = 4 << 30  # bytes
LONGEST_ERROR = 300  # characters
NICENESS = 10  # vLLM comes first


def main(requests: int, replies: int) -> None:
    """Serve until the other end of `requests` is closed."""
    for descriptor in (requests, replies):
        os.set_inheritable(descriptor, False)
    _die_with_parent(requests, replies)
    _limit(resource.RLIMIT_DATA, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    os.nice(NICENESS)
    own, serve = os.getpid(), _Server().serve
    with open(requests, encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            number = request.pop("number")
            reply = serve(request)
            if os.getpid() != own:  # a process that the function forked has returned from it, too
                os._exit(0)
            os.write(replies, json.dumps({"number": number, **reply}).encode() + b"\n")


class _Server:
    """Answers requests. It keeps the function from one to the next."""

    def __init__(self) -> None:
        self._function: Callable[..., Any] = lambda **_: ()
        self._kwargs: dict[str, Any] = {}

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request, also if the function or its import fails."""
        try:
            if "modules" in request:
                return {"digests": digests(request["modules"])}
            if "function" in request:
                return self._load(request["function"], request["kwargs"])
            return {"scores": scores(self._function(**request, **self._kwargs), len(request["real"]))}
        except BaseException as error:  # the user's code
            if isinstance(error, SystemExit) and "real" in request:
                raise  # what it executes may call exit(), which is no reason to end the run
            return {"memory": True} if out_of_memory(error) else {"raised": _last_line(error)}

    def _load(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        function = pkgutil.resolve_name(name)
        if not callable(function):
            raise TypeError(f"it is not a function: {type(function).__name__}")
        self._function, self._kwargs = function, kwargs
        try:
            signature = inspect.signature(function)
        except ValueError:  # some built-in functions have none
            signature = None
        if signature:
            batch: dict[str, Any] = {"prompt": [], "real": [], "synthetic": []}
            signature.bind_partial(**batch)
            try:
                signature.bind(**batch, **kwargs)
            except TypeError as error:
                return {"bad_kwargs": str(error)}
        # A decorated or imported function can be defined in another module than that in which it is found.
        modules = {name.partition(":")[0], getattr(function, "__module__", None)}
        return {"digests": digests(sorted(filter(None, modules)))}


def digests(modules: Iterable[str]) -> dict[str, str]:
    """Return the digest of each module's file, without importing it; empty if there is none."""
    return {module: _digest(module) for module in modules}


def _digest(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)  # imports the packages it is in
    except BaseException:  # noqa: BLE001 - the user's code; it fails again when it is loaded
        spec = None
    file = spec.origin if spec and spec.has_location else None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


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


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch raises a RuntimeError, system calls an OSError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _last_line(error: BaseException) -> str:
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    return next(line.strip() for line in reversed(lines) if line.strip())[:LONGEST_ERROR]


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _die_with_parent(requests: int, replies: int) -> None:
    """Start a process that kills the whole group once the parent has closed its end of `requests` or was killed.

    A thread could not do it while the function holds the interpreter's lock, as a regular expression does. The process
    is an orphan, so that the function cannot wait for it by mistake.
    """
    if os.fork() == 0:
        if os.fork() == 0:
            for descriptor in (replies, sys.stderr.fileno()):  # the parent waits for their end
                os.close(descriptor)
            poll = select.poll()
            poll.register(requests, 0)  # only whether the other end is closed
            poll.poll()
            os.killpg(0, signal.SIGKILL)
        os._exit(0)
    os.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # without waiting for threads that the function has started
