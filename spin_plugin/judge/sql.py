"""The ready-made judge `sqlite`: do two queries return the same rows?"""

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

# What a query may do. Everything else is refused: writing, ATTACH, PRAGMA, temporary tables.
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
LONGEST_VALUE = 1_000_000  # bytes of one value: a query can make a gigabyte in one step
SECONDS = 2.0  # per query, whose steps can take any time
STEPS_PER_CHECK = 1000
FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)

Rows = Counter[tuple[Any, ...]]


def sqlite(
    prompt: Sequence[Mapping[str, Any]],
    real: Sequence[str],
    synthetic: Sequence[str],
    *,
    database: str,
    max_steps: int = 10_000_000,
) -> list[float]:
    """Score 1 for a query with the rows of the real one, in any order, otherwise 0: execution accuracy.

    As in that measure, two queries without rows match, also if they ask for different things. A query that takes
    longer than 2 seconds counts as failed.

    Args:
        prompt: not used.
        real: the real queries; one that fails is never matched.
        synthetic: the synthetic queries, each alone or in a Markdown code block.
        database: path of the SQLite file, which is opened read-only.
        max_steps: virtual machine instructions after which a query counts as failed; the default takes about a second.

    Raises:
        sqlite3.Error: the database cannot be read.
        ValueError: `max_steps` is not positive.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps: {max_steps} is not positive")
    uri = f"{Path(database).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # is it a database?
        connection.text_factory = bytes  # text need not be valid UTF-8
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        connection.set_authorizer(_authorize)
        return [float(_same_rows(connection, *queries, max_steps)) for queries in zip(real, synthetic, strict=True)]


def _authorize(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _same_rows(connection: sqlite3.Connection, real: str, synthetic: str, max_steps: int) -> bool:
    expected = _rows(connection, real, max_steps)
    return expected is not None and _rows(connection, synthetic, max_steps, at_most=expected.total()) == expected


def _interrupt_after(connection: sqlite3.Connection, max_steps: int) -> None:
    """Let the next query be interrupted after this many steps, or when its time is over."""
    deadline, steps = time.monotonic() + SECONDS, min(max_steps, STEPS_PER_CHECK)
    left = count(max_steps - steps, -steps)
    connection.set_progress_handler(lambda: next(left) <= 0 or time.monotonic() > deadline, steps)


def _rows(connection: sqlite3.Connection, text: str, max_steps: int, at_most: int | None = None) -> Rows | None:
    """Return a query's rows with their counts; None if it fails or returns more than `at_most` rows."""
    fenced = FENCED.search(text)
    _interrupt_after(connection, max_steps)
    try:
        with closing(connection.execute(fenced.group(1) if fenced else text)) as cursor:
            if cursor.description is None:  # empty, or only a comment
                return None
            if at_most is None:
                return Counter(cursor)
            rows = Counter(cursor.fetchmany(at_most + 1))
            return rows if rows.total() <= at_most else None
    except (sqlite3.Error, sqlite3.Warning):  # Warning: several statements (Python 3.11)
        return None
