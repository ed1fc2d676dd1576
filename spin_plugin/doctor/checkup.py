"""What a check finds: its messages, each with a verdict."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import ParamSpec, TypeVar

from spin_plugin.console import ERROR, NOTE, RESULT, WARNING, SpinError, collected
from spin_plugin.training.loading import DATA_ERRORS

P = ParamSpec("P")
R = TypeVar("R")


class Verdict(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    SKIPPED = "skipped"


VERDICTS = {RESULT: Verdict.OK, NOTE: Verdict.OK, WARNING: Verdict.WARNING, ERROR: Verdict.FAULT}


@dataclass(frozen=True)
class Result:
    """One line of the result."""

    check: str
    verdict: Verdict
    message: str


class Skipped(Exception):  # noqa: N818 (not an error)
    """A check cannot be made here; says why."""


class Checkup:
    """Runs checks one after another.

    A check is a function that says what it finds as all code here does: by `say`, `warn` and `report_error`, and at its
    end by raising a `SpinError`.
    """

    def __init__(self, report: Callable[[Result], None]) -> None:
        self.report = report

    def skip(self, check: str, reason: str) -> None:
        """Report that a check is not made."""
        self.report(Result(check, Verdict.SKIPPED, reason))

    def run(self, check: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Run a check, report what it finds and return its result; None if it failed or was skipped."""
        result, last = None, None
        with collected() as messages:
            try:
                result = function(*args, **kwargs)
            except SpinError as error:
                last = Result(check, Verdict.FAULT, str(error))
            except Skipped as reason:
                last = Result(check, Verdict.SKIPPED, str(reason))
            except (*DATA_ERRORS, ImportError) as error:  # of a library, which training would meet as well
                if unreachable(error):
                    last = Result(check, Verdict.SKIPPED, f"the hub cannot be reached: {brief(error)}")
                else:
                    last = Result(check, Verdict.FAULT, f"{type(error).__name__}: {brief(error)}")
        for start, message in messages:
            self.report(Result(check, VERDICTS[start], message))
        if last:
            self.report(last)
        return result


def unreachable(error: BaseException) -> bool:
    """Whether an error arose because the hub cannot be reached; False if it answered that something is missing."""
    from httpx import TransportError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return any(
        isinstance(cause, (TransportError, LocalEntryNotFoundError, OfflineModeIsEnabled)) for cause in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it arose from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def brief(error: BaseException) -> str:
    """Return the first sentence of an error's message."""
    return " ".join(str(error).split()).partition(". ")[0][:200]
