"""What the user reads: one line for a result, one for a warning, one for an error."""

import errno
import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.text import Text

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 128 + 2  # as a shell reports a command that SIGINT ended

# Names from datasets and paths may hold brackets, so markup stays off; no highlighter, no wrapping:
# a line in a log file is one line.
console = Console(highlight=False, markup=False, soft_wrap=True)


# What a disk may answer to somebody who writes, and what helps. Nothing that was whole before is lost by it.
DISK = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EFBIG: "raise the limit of a file's size, then run the same command again",
    errno.EROFS: "use an output_dir that can be written",
    errno.EACCES: "use an output_dir that you may write",
    errno.EPERM: "use an output_dir that you may write",
    errno.ENOTDIR: "use an output_dir whose parents are directories",
    errno.ENOLCK: "the file system knows no locks; use an output_dir on another one",
    errno.EIO: "check the disk, then run the same command again",
}


class SpinError(ValueError):
    """Something the user can put right: the message is one line that names the key or file and the way out."""


def say(message: str) -> None:
    """Print one line of result."""
    _print("spin: ", "bold cyan", message)


def warn(message: str) -> None:
    """Print one line about something the user should act on."""
    _print("spin: warning: ", "bold yellow", message)


def report_error(message: str) -> None:
    """Print one line about why this process ends."""
    _print("spin: error: ", "bold red", message)


def _print(start: str, style: str, message: str) -> None:
    """Data, logs and model output may hold anything: what a terminal would obey is shown, not sent."""
    shown = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in " ".join(message.split()))
    console.print(Text.assemble((start, style), shown))


def exit_in_one_line(hook: Callable[P, R]) -> Callable[P, R]:
    """Turn a `SpinError`, a disk's refusal or Ctrl-C that leaves `hook` into one line and an exit code above 0."""

    @wraps(hook)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return hook(*args, **kwargs)
        except SpinError as error:
            reason = str(error)
        except OSError as error:
            if error.errno not in DISK:
                raise
            reason = disk_error(error)
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on")
            raise SystemExit(INTERRUPTED) from None
        report_error(reason)
        raise SystemExit(1)

    return wrapper


def disk_error(error: OSError) -> str:
    """A disk's refusal in words: which file, why, and what helps."""
    assert error.errno is not None
    reason = os.strerror(error.errno)
    # Some writers know the number of the error and not the file.
    return f"{error.filename or 'a file of output_dir'}: {reason}; {DISK[error.errno]}"
