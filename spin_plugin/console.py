"""Messages to the user: results, details, warnings and errors, each on one line."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.text import Text

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 128 + 2  # the exit code of a command ended by SIGINT

# No markup, because dataset names and paths may contain brackets. No wrapping, so that a message stays on one line in
# a log file.
console = Console(highlight=False, markup=False, soft_wrap=True)
# How the lines of each kind begin. `spin: ` begins all of them, so it comes last.
ERROR, WARNING, NOTE, RESULT = "spin: error: ", "spin: warning: ", "spin: note: ", "spin: "
STYLES = {ERROR: "bold red", WARNING: "bold yellow", NOTE: "dim", RESULT: "bold cyan"}
Messages = list[tuple[str, str]]
"""Messages in order, each with how its line begins."""
_collecting: list[Messages] = []


# Disk errors that can occur on writing, and the way out. None of them damages files that were complete before.
DISK_ERRORS = {
    errno.ENOSPC: "free some space, then rerun the same command",
    errno.EDQUOT: "free some of your quota, then rerun the same command",
    errno.EFBIG: "raise the file size limit, then rerun the same command",
    errno.EROFS: "use a directory on a writable file system",
    errno.EACCES: "check who may read and write it, or use another directory",
    errno.EPERM: "check who may read and write it, or use another directory",
    errno.ENOTDIR: "use an output_dir whose parents are directories",
    errno.ENOLCK: "the file system does not support locks; use an output_dir on another one",
    errno.EIO: "check the disk, then rerun the same command",
}


class SpinError(ValueError):
    """An error the user can fix. The message is one line: the key or file, the problem and the way out."""


def say(message: str) -> None:
    """Print a one-line result."""
    _print(RESULT, message)


def note(message: str) -> None:
    """Print a one-line detail, which `axolotl spin train` leaves to the log."""
    _print(NOTE, message)


def warn(message: str) -> None:
    """Print a one-line warning about something the user should act on."""
    _print(WARNING, message)


def report_error(message: str) -> None:
    """Print one line on why this process exits."""
    _print(ERROR, message)


@contextmanager
def collected() -> Iterator[Messages]:
    """Collect messages instead of printing them."""
    _collecting.append([])
    try:
        yield _collecting[-1]
    finally:
        _collecting.pop()


def escaped(text: str) -> str:
    """Escape control characters: data, logs and model output may contain terminal sequences."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def _print(start: str, message: str) -> None:
    shown = escaped(" ".join(message.split()))
    if _collecting:
        return _collecting[-1].append((start, shown))
    console.print(Text.assemble((start, STYLES[start]), shown))


def exit_on_error(hook: Callable[P, R]) -> Callable[P, R]:
    """Turn a `SpinError`, a disk error or Ctrl-C raised by `hook` into a one-line message and a nonzero exit code."""

    @wraps(hook)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return hook(*args, **kwargs)
        except SpinError as error:
            reason = str(error)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            reason = disk_error(error)
        except KeyboardInterrupt:
            say("interrupted; rerun the same command to continue")
            raise SystemExit(INTERRUPTED) from None
        report_error(reason)
        raise SystemExit(1)

    return wrapper


def disk_error(error: OSError) -> str:
    """Describe a disk error: the file, the reason and the way out."""
    assert error.errno is not None
    reason = os.strerror(error.errno)
    # Some writers set the error number without the file name.
    return f"{error.filename or 'a file in output_dir'}: {reason}; {DISK_ERRORS[error.errno]}"
