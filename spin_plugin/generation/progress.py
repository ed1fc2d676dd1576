"""Progress of a generation job: a bar on a terminal, otherwise a line every 20 seconds."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from spin_plugin.console import console, say

LOG_INTERVAL = 20.0


class Progress:
    """Responses done, responses/s, tokens/s and time left."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title = total, title
        self.done = self.tokens = 0
        self.running = False
        self.started = self.last_line = time.monotonic()
        self.bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task(f"{title} (vLLM is starting)", total=total, rate="", start=False)

    def __enter__(self) -> "Progress":
        self.bar.start()
        if not console.is_terminal:
            say(f"{self.title}: {self.total:,} requested, vLLM is starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.done == self.total:
            say(f"{self.title}: {self.done:,} in {self.seconds:.0f} s, {self.rate()}")

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-6)

    def start(self) -> None:
        """Start the clock once the first engine is ready."""
        if self.running:
            return
        self.running = True
        self.started = self.last_line = time.monotonic()
        self.bar.start_task(self.task)
        self.bar.update(self.task, description=self.title)

    def advance(self, tokens: int) -> None:
        """Count one response of `tokens` tokens."""
        self.done += 1
        self.tokens += tokens
        self.bar.update(self.task, advance=1, rate=self.rate())
        now = time.monotonic()
        if not console.is_terminal and now - self.last_line > LOG_INTERVAL:
            self.last_line = now
            left = self.seconds / self.done * (self.total - self.done)
            say(f"{self.title}: {self.done:,} of {self.total:,}, {self.rate()}, {left:.0f} s left")

    def rate(self) -> str:
        return f"{self.done / self.seconds:,.0f} responses/s, {self.tokens / self.seconds:,.0f} tokens/s"
