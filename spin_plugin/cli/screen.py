"""What `axolotl spin train` shows of `axolotl train`: the plugin's lines. All output is in a log file."""

import re
from collections import deque
from pathlib import Path

from rich.markup import escape
from rich.status import Status
from rich.text import Text

from spin_plugin.console import ERROR, STYLES, console

LAST = 30
"""Lines of the log that are shown if the command fails without saying why."""
# Lines that only say how far a stage is. On a terminal they replace each other.
PROGRESS = re.compile(r"spin: iteration \d+: .*, [\d,]+ s left$")


class Screen:
    """Shows the plugin's lines of a command that writes to a log; on a terminal also the latest other line.

    The command writes the file itself, not a pipe, so that it goes on if this process is killed.
    """

    def __init__(self, log: Path, title: str) -> None:
        """Create the log.

        Args:
            log: a new file for the command's stdout and stderr.
            title: what a terminal shows until the first line.

        Raises:
            OSError: the log cannot be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.output = log, open(log, "xb")  # noqa: SIM115 closed in __exit__
        self._written, self._incomplete = open(log, "rb"), b""  # noqa: SIM115
        self._error, self._last = False, deque[str](maxlen=LAST)
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
        if start and not (self._status and PROGRESS.match(line)):
            self._error |= start == ERROR
            console.print(Text.assemble((start, STYLES[start]), line.removeprefix(start)))
        elif self._status:
            self._status.update(escape(line[: console.width - 4]))
