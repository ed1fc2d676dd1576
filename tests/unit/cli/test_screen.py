"""What is shown of `axolotl train`."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from spin_plugin.cli import screen
from spin_plugin.cli.screen import LAST, Screen

PROGRESS = "spin: iteration 1: training: step 5 of 66, loss 0.612, 4.4 s/step, 230 s left"
OUTPUT = "\n".join(["loading [bold]", PROGRESS, "\r 10%\r 20%", "spin: iteration 1 finished", "spin: warning: too hot"])


def show(text: str, log: Path, *, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Screen]:
    """Return what a command with this output shows."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100, soft_wrap=True, highlight=False, markup=False)
    monkeypatch.setattr(screen, "console", console)
    with Screen(log, "iteration 1") as found:
        for part in (text[:20], text[20:]):
            found.output.write(part.encode())
            found.output.flush()
            found.update()
        time.sleep(0.3 if terminal else 0.0)  # a status is drawn several times a second
    return shown.getvalue(), found


def test_a_pipe_gets_the_plugins_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, found = show(OUTPUT, tmp_path / "new/train.log", terminal=False, monkeypatch=monkeypatch)
    assert text.splitlines() == [PROGRESS, "spin: iteration 1 finished", "spin: warning: too hot"]
    assert (tmp_path / "new/train.log").read_bytes() == OUTPUT.encode()
    found.explain()
    assert screen.console.file.getvalue().count("loading") == 1, "no error was shown"


def test_on_a_terminal_progress_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = show(f"{PROGRESS}\nspin: done\n{PROGRESS}", tmp_path / "log", terminal=True, monkeypatch=monkeypatch)
    assert "done" in text
    assert "step 5 of 66" in text
    assert text.rstrip("\n").endswith("\x1b[2K"), "the status is erased"


def test_hostile_output_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\x1b[2J[/nothing]\n" + "x" * 100_000 + "\nspin: error: broken"
    text, found = show(text, tmp_path / "log", terminal=True, monkeypatch=monkeypatch)
    assert "\x1b[2J" not in text
    before = len(screen.console.file.getvalue())
    found.explain()
    assert len(screen.console.file.getvalue()) == before, "the plugin's error is enough"


def test_the_end_of_the_log_explains_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(f"line {number}" for number in range(100))
    _, found = show(lines, tmp_path / "log", terminal=False, monkeypatch=monkeypatch)
    found.explain()
    *said, where = screen.console.file.getvalue().splitlines()
    assert said == [f"line {number}" for number in range(100 - LAST, 100)]
    assert where == f"spin: the end of {tmp_path / 'log'}"
