"""Atomic writes: after a kill or power loss, a file or directory is either complete or absent."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRASH = ".removed-"
REPLACED = ".replaced-"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: after a kill or power loss it is either unchanged or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _cleanup_on_error(path, temporary):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_dir_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a directory atomically: `fill` writes to a temporary directory, which is renamed once complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _cleanup_on_error(path, temporary):
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush(temporary.rglob("*"))
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)


def flush(files: Iterable[Path]) -> None:
    """Force files written by other code to disk (fsync)."""
    for file in files:
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


def remove_atomically(path: Path) -> None:
    """Remove a directory atomically: a kill midway leaves only a trash directory, which is never read."""
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Move a directory that cost GPU time to a backup name; only the newest backup per name is kept.

    After a kill midway, the directory is either in place or set aside. Works on a full disk.

    Returns:
        The backup's path.
    """
    aside = path.with_name(f"{REPLACED}{path.name}")
    remove_atomically(aside)
    os.rename(path, aside)
    return aside


@contextmanager
def _cleanup_on_error(path: Path, temporary: Path) -> Iterator[None]:
    """On an OSError, name `path` in it and delete the partial write, because the disk may be full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)  # errors on an open file carry no name
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
