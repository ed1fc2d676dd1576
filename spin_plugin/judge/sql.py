"""The ready-made judge `sqlite`: do two queries return the same rows?"""

import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

# What a query may do. Everything else is refused: writing, ATTACH, PRAGMA, temporary tables.
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
LONGEST_VALUE = 10_000_000  # bytes of one value: a query can make a gigabyte in one step
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

    Args:
        prompt: not used.
        real: the real queries; one that fails is never matched.
        synthetic: the synthetic queries, each alone or in a Markdown code block.
        database: path of the SQLite file, which is opened read-only.
        max_steps: virtual machine instructions after which a query counts as failed; the default takes about a second.

    Raises:
        sqlite3.Error: the database cannot be read.
    """
    uri = f"{Path(database).absolute().as_uri()}?mode=ro"
    # Statements are not cached, because a cached one would go on counting its steps.
    with closing(sqlite3.connect(uri, uri=True, cached_statements=0)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # is it a database?
        connection.text_factory = bytes  # text need not be valid UTF-8
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: True, max_steps)  # interrupts the query
        return [float(_same_rows(connection, *queries)) for queries in zip(real, synthetic, strict=True)]


def _authorize(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _same_rows(connection: sqlite3.Connection, real: str, synthetic: str) -> bool:
    expected = _rows(connection, real)
    return expected is not None and _rows(connection, synthetic, at_most=expected.total()) == expected


def _rows(connection: sqlite3.Connection, text: str, at_most: int | None = None) -> Rows | None:
    """Return a query's rows with their counts; None if it fails or returns more than `at_most` rows."""
    fenced = FENCED.search(text)
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
