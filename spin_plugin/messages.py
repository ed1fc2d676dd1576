"""What the user reads: one line for a result, one for a warning, one for an error."""

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


class SpinError(ValueError):
    """Something the user can put right: the message is one line that names the key or file and the way out."""


def say(message: str) -> None:
    """Print one line of result."""
    console.print(Text.assemble(("spin: ", "bold cyan"), message))


def warn(message: str) -> None:
    """Print one line about something the user should act on."""
    console.print(Text.assemble(("spin: warning: ", "bold yellow"), message))


def exit_in_one_line(hook: Callable[P, R]) -> Callable[P, R]:
    """Turn a `SpinError` or Ctrl-C that leaves `hook` into one line on the terminal and an exit code that is not 0."""

    @wraps(hook)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return hook(*args, **kwargs)
        except SpinError as error:
            one_line = " ".join(str(error).split())
            console.print(Text.assemble(("spin: error: ", "bold red"), one_line))
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on")
            raise SystemExit(INTERRUPTED) from None

    return wrapper
