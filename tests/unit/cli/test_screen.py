"""What is shown of `axolotl train`."""

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from spin_plugin.cli import screen
from spin_plugin.cli.screen import LAST, Screen, run_logged

PROGRESS = "spin: iteration 1: training: step 5 of 66, loss 0.612, 4.4 s/step, 230 s left"
NOTE = "spin: note: responses are limited to 14 tokens"
SHOWN = ["spin: iteration 1 finished", "spin: warning: too hot"]
OUTPUT = "\n".join(["loading [bold]", PROGRESS, "\r 10%\r 20%", NOTE, *SHOWN])


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


def test_a_pipe_gets_results_and_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, found = show(OUTPUT, tmp_path / "new/train.log", terminal=False, monkeypatch=monkeypatch)
    assert text.splitlines() == SHOWN
    assert (tmp_path / "new/train.log").read_bytes() == OUTPUT.encode()
    found.explain()
    assert screen.console.file.getvalue().count("loading") == 1, "no error was shown"


def test_lines_of_progress_in_a_pipe_become_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run of any length prints few: after 1, 3, 7, 15 minutes, then every ten."""
    now = 0.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    shown = io.StringIO()
    monkeypatch.setattr(screen, "console", Console(file=shown, width=100, soft_wrap=True))
    found, minutes = Screen(tmp_path / "log", "iteration 1"), []
    with found:
        for now in range(0, 60 * 60, 20):
            before = len(shown.getvalue())
            found._show(PROGRESS)
            if len(shown.getvalue()) > before:
                minutes.append(now / 60)
    assert minutes == [1, 3, 7, 15, 25, 35, 45, 55]


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


def test_a_long_line_of_another_package_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip's list of what it has installed."""
    monkeypatch.setattr(screen, "FIRST_WAIT", 0.0)
    shown = io.StringIO()
    monkeypatch.setattr(screen, "console", Console(file=shown, width=100, soft_wrap=True))
    assert run_logged(tmp_path / "log", [sys.executable, "-c", "print('x' * 3000)"]) == 0
    assert shown.getvalue() == "x" * 96 + "\n"


@pytest.mark.parametrize("code", [0, 3])
def test_output_of_other_commands_is_logged_and_shown_if_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "console", Console(file=shown, width=100, soft_wrap=True))
    log = tmp_path / "log"
    log.write_text("of an earlier attempt")
    program = f"import sys; print('collecting'); print('no disk', file=sys.stderr); sys.exit({code})"
    assert run_logged(log, [sys.executable, "-u", "-c", program]) == code
    assert log.read_text() == "collecting\nno disk\n"
    assert ("no disk" in shown.getvalue()) == bool(code)


def test_command_ends_with_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Screen) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "update", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_logged(tmp_path / "log", [sys.executable, "-c", "import time; time.sleep(300)"])
    assert time.monotonic() - started < 200
