"""Files and directories that are either whole or absent, also after a kill or a power cut."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRASH = ".removed-"
REPLACED = ".replaced-"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either absent (or as it was) or complete, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path, temporary):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_dir_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a directory's files under another name; the directory appears when they are complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _naming(path, temporary):
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
    """Wait until files that others have written lie on the disk."""
    for file in files:
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())


def remove_atomically(path: Path) -> None:
    """Remove a directory in one step: what a kill in the middle leaves has a name that nobody reads."""
    trash = path.with_name(f"{TRASH}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give a directory that cost GPU time another name, which nobody reads; only the newest one of a name is kept.

    Killed in the middle it is either still in its place or set aside; a full disk is no hindrance.

    Returns:
        where it lies now.
    """
    aside = path.with_name(f"{REPLACED}{path.name}")
    remove_atomically(aside)
    os.rename(path, aside)
    return aside


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Where `path` cannot be written, say so by its name and leave nothing half-written on a disk that may be full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)  # the system does not name it once a file is open
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
