"""What `axolotl spin train` shows of `axolotl train`: the plugin's results and warnings. A log has everything."""

import re
import subprocess
import time
from collections import deque
from pathlib import Path

from rich.markup import escape
from rich.status import Status
from rich.text import Text

from spin_plugin.console import ERROR, NOTE, RESULT, STYLES, console

LAST = 30
"""Lines of the log that are shown if the command fails without saying why."""
# Lines that only say how far a stage is. On a terminal they replace each other; in a pipe ever fewer are shown.
PROGRESS = re.compile(r"spin: iteration \d+: .*, ([\d,]+ s left|vLLM is starting)$")
ANYTHING = re.compile("")
FIRST_WAIT, LONGEST_WAIT = 60.0, 600.0
"""Seconds until a pipe gets the first line of progress, and at most between two."""


class Screen:
    """Shows the results and warnings of a command that writes to a log; on a terminal also its latest line.

    The command writes the file itself, not a pipe, so that it goes on if this process is killed.
    """

    def __init__(self, log: Path, title: str, progress: re.Pattern[str] = PROGRESS) -> None:
        """Create the log.

        Args:
            log: a new file for the command's stdout and stderr.
            title: what a terminal shows until the first line.
            progress: matches the lines that say how far the command is.

        Raises:
            OSError: the log cannot be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.output = log, open(log, "xb")  # noqa: SIM115 closed in __exit__
        self._written, self._incomplete = open(log, "rb"), b""  # noqa: SIM115
        self._error, self._last = False, deque[str](maxlen=LAST)
        self._progress, self._wait, self._due = progress, FIRST_WAIT, time.monotonic() + FIRST_WAIT
        self._status = Status(title, console=console) if console.is_terminal else None

    def __enter__(self) -> "Screen":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self._show(self._incomplete.decode(errors="replace"))
        if self._status:
            self._status.stop()
        self._written.close()
        self.output.close()

    def update(self) -> None:
        """Show what was written since the last call."""
        *lines, self._incomplete = (self._incomplete + self._written.read()).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._show(line.decode(errors="replace"))

    def explain(self) -> None:
        """Show the end of the log of a command that failed without an error of the plugin."""
        if not self._error:
            console.print(Text("\n".join([*self._last, f"spin: the end of {self.log}"])))

    def _show(self, line: str) -> None:
        line = "".join(letter if letter.isprintable() else " " for letter in line).rstrip()
        if not line:
            return
        self._last.append(line)
        start = next((start for start in STYLES if line.startswith(start)), None)
        is_progress = start in (None, RESULT) and self._progress.match(line)
        if self._is_progress_due() if is_progress else start not in (None, NOTE):
            self._error |= start == ERROR
            if start:
                console.print(Text.assemble((start, STYLES[start]), line.removeprefix(start)))
            else:  # another package's line can be long
                console.print(Text(line[: console.width - 4]))
        elif self._status:
            self._status.update(escape(line[: console.width - 4]))

    def _is_progress_due(self) -> bool:
        """Return whether to print a line of progress; then wait twice as long for the next one."""
        now = time.monotonic()
        if self._status or now < self._due:
            return False
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._due = now + self._wait
        return True


def run_logged(log: Path, command: list[str]) -> int:
    """Run a command of another package with all of its output in a log, and return its exit code.

    A terminal shows its latest line, a pipe one now and then; if it fails, the end of the log is shown.

    Raises:
        OSError: the log cannot be written, or the command cannot be started.
    """
    log.unlink(missing_ok=True)
    with (
        Screen(log, " ".join(command), ANYTHING) as screen,
        subprocess.Popen(command, stdout=screen.output, stderr=subprocess.STDOUT) as child,
    ):
        try:
            while (code := child.poll()) is None:
                time.sleep(0.2)
                screen.update()
        except BaseException:  # Ctrl-C, or SIGTERM as an exception: the command must not outlive this one
            child.kill()
            raise
    if code:
        screen.explain()
    return code
