"""Full, read-only and unwritable disks give one line with the file and the fix, and no data is lost.

Full disks are small tmpfs mounts in a private mount namespace, which disappears with its process.
"""

import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT

from spin_plugin.console import DISK_ERRORS, SpinError, exit_on_error
from spin_plugin.run.atomic import write_atomically
from spin_plugin.run.directory import RunDir
from spin_plugin.run.disk import Space, require_space
from spin_plugin.run.iteration import IterationDir

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def on_a_disk(directory: Path, size: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program (`directory` is its first argument) with a tmpfs of `size` mounted on the directory."""
    mounted = f'mount -t tmpfs -o size={size} tmpfs {directory} && exec {sys.executable} -c "$0" {directory}'
    return subprocess.run(
        [*NAMESPACE, "sh", "-c", mounted, textwrap.dedent(program)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


# --- full disk ---------------------------------------------------------------------------------

FULL = """
    import json, sys
    from pathlib import Path
    import numpy as np
    from spin_plugin.generation.shards import Shards
    from spin_plugin.console import exit_on_error
    from spin_plugin.run.directory import RunDir
    from spin_plugin.run.state import RunState
    from spin_plugin.run.atomic import write_dir_atomically, write_atomically

    root = Path(sys.argv[1])
    run, shards = RunDir(root), Shards(root / "iteration-0/synthetic")
    shards.directory.mkdir(parents=True)
    pairs = run.iteration(0).pairs
    write_atomically(root / "metrics", "old")
    write_dir_atomically(pairs, lambda directory: (directory / "train.arrow").write_text("old") and None)
    run.write_state(RunState({}, [], "1"))
    before = {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def store() -> None:
        from spin_plugin.opponent.store import OpponentStore
        import torch
        OpponentStore(root / "opponent", 600_000, "key").save(torch.zeros(600_000))

    def arrow(directory) -> None:
        from spin_plugin.data.table import PAIR_SCHEMA, table_writer
        with table_writer(directory / "train.arrow", PAIR_SCHEMA) as write:
            row = {"prompt": list(range(400_000)), "real": [], "synthetic": []}
            write({name: [row.get(name, 0)] for name in PAIR_SCHEMA.names})

    WRITERS = {
        "a file": lambda: write_atomically(root / "metrics", "x" * 2_000_000),
        "run.json": lambda: run.write_state(RunState({"x": "x" * 2_000_000}, [], "1")),
        "a shard": lambda: shards.write(0, ({"tokens": list(range(300_000))} for _ in range(2))),
        "pairs": lambda: write_dir_atomically(pairs, arrow),
        "opponent": store,
    }
    try:
        exit_on_error(WRITERS["%s"])()
    finally:
        after = {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert after == before, (sorted(after), sorted(before))
"""


@pytest.mark.parametrize(
    ("writer", "file"),
    [("a file", "metrics"), ("run.json", "run.json"), ("a shard", "shard-00000.jsonl"), ("pairs", "pairs"),
     ("opponent", "opponent")],
)  # fmt: skip
def test_full_disk_is_reported_and_existing_files_are_kept(tmp_path: Path, writer: str, file: str) -> None:
    done = on_a_disk(tmp_path, "1m", FULL % writer)
    assert done.returncode == 1, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("spin: error: ")
    assert file in line
    assert "No space left" in line
    assert "free some space" in line
    assert done.stderr == ""


def test_full_disk_while_saving_a_checkpoint_is_reported(tmp_path: Path) -> None:
    """safetensors and torch report a full disk differently."""
    program = """
        import sys, torch
        from safetensors.torch import save_file
        from spin_plugin.console import SpinError
        from spin_plugin.training.saving import disk_errors
        tensors = {"a": torch.zeros(1_000_000)}
        for save in (lambda file: save_file(tensors, file), lambda file: torch.save(tensors, file)):
            try:
                with disk_errors(sys.argv[1]):
                    save(sys.argv[1] + "/file")
            except SpinError as error:
                print(error)
    """
    done = on_a_disk(tmp_path, "1m", program)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "resumes from the last complete checkpoint" in line]
    assert len(lines) == 2, done.stdout
    assert all(str(tmp_path) in line for line in lines)


def test_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    write_atomically(tmp_path / "run.json", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_atomically(tmp_path / "run.json", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "run.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# --- read-only and unwritable directories -------------------------------------------------------


def test_read_only_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    program = """
        import subprocess, sys
        from pathlib import Path
        from spin_plugin.console import exit_on_error
        from spin_plugin.run.directory import RunDir
        subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
        exit_on_error(RunDir(Path(sys.argv[1]) / "outputs/run").require_writable)()
    """
    done = on_a_disk(tmp_path, "1m", program)
    assert done.returncode == 1
    assert done.stdout == f"spin: error: output_dir: {tmp_path} is not writable; use another one\n"


def test_output_dir_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpinError, match="file is not a directory"):
        RunDir(tmp_path / "file" / "run").require_writable()
    RunDir(tmp_path / "new" / "run").require_writable()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", sorted(DISK_ERRORS), ids=lambda number: errno.errorcode[number])
def test_disk_error_is_one_line(capsys: pytest.CaptureFixture[str], number: int) -> None:
    @exit_on_error
    def write() -> None:
        raise OSError(number, os.strerror(number), "/outputs/run.json")

    with pytest.raises(SystemExit) as stopped:
        write()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"spin: error: /outputs/run.json: {os.strerror(number)}; {DISK_ERRORS[number]}"


def test_other_os_errors_keep_their_traceback() -> None:
    @exit_on_error
    def buggy() -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    with pytest.raises(FileNotFoundError):
        buggy()


# --- space -------------------------------------------------------------------------------------


def test_space_is_checked_before_work_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, Space(minimum=0, expected=free // 2))
    assert capsys.readouterr().out == ""
    require_space(tmp_path, Space(minimum=0, expected=4 * free))
    assert "save_total_limit" in capsys.readouterr().out
    with pytest.raises(SpinError, match="output_dir"):
        require_space(tmp_path, Space(minimum=4 * free, expected=4 * free))


# --- clock changes -----------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-5, 0, 5])
def test_clock_change_does_not_change_the_newest_checkpoint(tmp_path: Path, hours: int) -> None:
    """transformers sorts checkpoints by mtime before it deletes the oldest; the clock changes after the second one."""
    from transformers.trainer_utils import sort_checkpoints

    from spin_plugin.training.saving import fix_mtimes

    now = time.time()
    for step, age in ((7, 30), (14, 20), (100, 10)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        moment = now - age - (hours * 3600 if step < 100 else 0)
        os.utime(tmp_path / f"checkpoint-{step}", (moment, moment))
    fix_mtimes(IterationDir(tmp_path).checkpoints())
    (tmp_path / "checkpoint-107").mkdir()
    names = [Path(path).name for path in sort_checkpoints(str(tmp_path), use_mtime=True)]
    assert names == ["checkpoint-7", "checkpoint-14", "checkpoint-100", "checkpoint-107"]
