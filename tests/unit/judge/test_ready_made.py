"""The ready-made judges: tables of cases, properties, and the real case of text-to-SQL."""

import json
import os
import random
import re
import sqlite3
import string
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spin_plugin.judge
from spin_plugin.args.judge import READY_MADE
from spin_plugin.judge import exact, number, sqlite
from spin_plugin.judge.answers import last_number


def test_options_name_every_ready_made_judge() -> None:
    assert list(READY_MADE) == spin_plugin.judge.__all__


# --- exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("real", "synthetic", "plain", "case", "whitespace"),
    [
        ("Paris", "Paris", 1, 1, 1),
        ("Paris", "paris", 0, 1, 0),
        ("Straße", "STRASSE", 0, 1, 0),
        ("New York", " New\n York ", 0, 0, 1),
        ("no where", "nowhere", 0, 0, 0),
        ("", "", 1, 1, 1),
        ("", " ", 0, 0, 1),
        ("a", "b", 0, 0, 0),
    ],
)
def test_exact(real: str, synthetic: str, plain: int, case: int, whitespace: int) -> None:
    assert exact([{}], [real], [synthetic]) == [plain]
    assert exact([{}], [real], [synthetic], ignore_case=True) == [case]
    assert exact([{}], [real], [synthetic], ignore_whitespace=True) == [whitespace]


# --- number ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", "42"),
        ("#### 1,234", "1234"),
        ("1,234,567.50 dollars", "1234567.50"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("so -5", "-5"),
        ("so −5", "-5"),
        ("so –5", "-5"),
        ("7–3", "3"),
        ("1e5", "100000"),
        ("about 1.5E-3 mm", "0.0015"),
        ("2e3x", "3"),
        ("1e999999999", "999999999"),
        ("+7", "7"),
        ("7-3", "3"),
        ("(2)-3", "3"),
        ("$-3.5", "-3.5"),
        ("$1,000", "1000"),
        ("= .5", "0.5"),
        ("-.5", "-0.5"),
        ("10%", "10"),
        ("1/2", "2"),
        ("first 3, then 4.", "4"),
        ("3.14.", "3.14"),
        ("7,", "7"),
        ("v2 is out", "2"),
        ("١٢", None),
        ("none", None),
        ("- , .", None),
        ("", None),
    ],
)
def test_last_number(text: str, value: str | None) -> None:
    assert last_number(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("real", "synthetic", "tolerance", "score"),
    [
        ("18", "It is 18.00", 0, 1),
        ("18", "It is 18.01", 0, 0),
        ("18", "It is 18.01", 0.01, 1),
        ("18", "It is 18.02", 0.01, 0),
        ("0.3", "0.1 + 0.2 = 0.30", 0, 1),
        ("1,000", "1000", 0, 1),
        ("9007199254740993", "9007199254740992", 0, 0),  # equal as floats
        ("no number", "no number", 0, 0),
        ("3", "three", 9, 0),
        ("5", "-5", 0, 0),
    ],
)
def test_number(real: str, synthetic: str, tolerance: float, score: int) -> None:
    assert number([{}], [real], [synthetic], tolerance=tolerance) == [score]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9), st.booleans())
def test_any_written_number_is_read(value: Decimal, commas: bool) -> None:
    assert last_number(f"at first 17, finally {value:{',' if commas else ''}f}.") == value


@given(st.text(alphabet=string.digits + "+-−,. a(%)$", max_size=40))
def test_any_text_has_a_finite_last_number_or_none(text: str) -> None:
    found = last_number(text)
    assert (found is None) == (re.search("[0-9]", text) is None)
    assert found is None or found.is_finite()


# --- sqlite ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("database") / "cities #1.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            """
            CREATE TABLE city (name TEXT, state TEXT, population INTEGER);
            INSERT INTO city VALUES ('a', 'x', 10), ('b', 'x', 20), ('c', 'y', 20), ('d', 'y', NULL),
                                    (CAST(x'ff' AS TEXT), 'z', 5);
            """
        )
    return str(path)


REAL = "select population from city where state = 'x' or state = 'y'"


@pytest.mark.parametrize(
    ("real", "synthetic", "score"),
    [
        (REAL, REAL, 1),
        (REAL, "SELECT population FROM city WHERE state IN ('y', 'x') ORDER BY population DESC;", 1),
        (REAL, "select distinct population from city where state in ('x', 'y')", 0),
        (REAL, "select population, 1 from city where state in ('x', 'y')", 0),
        (REAL, "select population from city where state = 'x'", 0),
        (REAL, f"{REAL} union all {REAL}", 0),
        (REAL, f"```sql\n{REAL}\n```", 1),
        (REAL, f"The query is:\n```\n{REAL};\n```\nIt lists populations.", 1),
        (REAL, f"{REAL}; {REAL}", 0),
        (REAL, "select population from town", 0),
        (REAL, "", 0),
        (REAL, "selec", 0),
        (REAL, "select \0", 0),
        ("select name from city where population = 99", "select state from city where 0", 1),  # both without rows
        ("select name from city where population = 99", "-- nothing", 0),
        ("select name from city where population = 99", "", 0),
        ("select x from y", "select x from y", 0),  # a real query that fails is never matched
        ("", "", 0),
        ("select count(*) from city", "select 5", 1),
        ("select name from city where state = 'z'", "select cast(x'ff' as text)", 1),
        ("with recursive n(i) as (select 1 union select i+1 from n limit 3) select * from n", "values (3),(1),(2)", 1),
    ],
)  # fmt: skip
def test_sqlite(database: str, real: str, synthetic: str, score: int) -> None:
    assert sqlite([{}], [real], [synthetic], database=database) == [score]


FORBIDDEN = [
    "delete from city returning population",
    "insert into city values ('e', 'x', 1) returning population",
    "update city set population = 0 returning population",
    "drop table city",
    "create temp table t as select 1",
    "attach 'other.sqlite' as other",
    "vacuum into 'other.sqlite'",
    "pragma table_info(city)",
    "pragma writable_schema = 1",
    "select load_extension('evil')",
    "begin",
]


@pytest.mark.parametrize("query", FORBIDDEN)
def test_only_reading_is_allowed(database: str, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = Path(database).read_bytes()
    assert sqlite([{}] * 3, [query, REAL, REAL], [query, query, REAL], database=database) == [0, 0, 1]
    assert Path(database).read_bytes() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_steps", [0, -1])
def test_steps_must_be_positive(database: str, max_steps: int) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        sqlite([{}], [REAL], [REAL], database=database, max_steps=max_steps)


def test_expensive_functions_do_not_escape_the_limit(database: str) -> None:
    """Each step takes milliseconds, so that all of max_steps would take hours."""
    slow = ENDLESS.replace("count(*)", "sum(length(hex(randomblob(490000))))")
    started = time.process_time()
    assert sqlite([{}], [slow], [slow], database=database) == [0]
    assert time.process_time() - started < 20  # 2 s, far from hours


ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"


def test_endless_query_is_stopped_and_the_next_one_has_all_its_steps(database: str) -> None:
    queries = [ENDLESS, REAL, "select zeroblob(1000000000)", *[REAL] * 50]
    expected = [0, 1, 0, *[1] * 50]
    assert sqlite([{}] * len(queries), queries, queries, database=database, max_steps=2000) == expected


def test_many_rows_are_not_collected(database: str) -> None:
    endless_rows = ENDLESS.replace("count(*)", "i")
    assert sqlite([{}], [REAL], [endless_rows], database=database, max_steps=2**31 - 1) == [0]


@pytest.mark.parametrize("content", [None, b"not a database, but long enough to be one" * 100])
def test_unusable_database_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "absent.sqlite"
    if content:
        file.write_bytes(content)
    with pytest.raises(sqlite3.Error):
        sqlite([{}], [REAL], [REAL], database=str(file))
    assert file.exists() == (content is not None)


@given(st.text(max_size=30))
def test_any_text_gets_a_score(database: str, text: str) -> None:
    assert sqlite([{}], [REAL], [text], database=database) == [0.0]


# --- text-to-SQL -------------------------------------------------------------------------------

GEOQUERY = os.environ.get("SPIN_GEOQUERY")


@pytest.mark.skipif(not GEOQUERY, reason="SPIN_GEOQUERY names no directory with train.jsonl and geography.sqlite")
def test_geography_questions_agree_with_an_independent_count() -> None:
    """Perturbed queries: other numbers, other comparisons, the query of another question, and equivalent ones."""
    directory = Path(str(GEOQUERY))
    rows = [json.loads(line)["messages"] for line in (directory / "train.jsonl").read_text().splitlines()]
    queries = [row[-1]["content"] for row in rows]
    draw = random.Random(0)
    pairs = [(query, query) for query in queries]
    pairs += [(query, draw.choice(queries)) for query in queries]
    pairs += [(query, query.replace("max(", "min(").replace(" = ", " <> ", 1)) for query in queries]
    pairs += [(query, f"select * from ({query}) order by 1") for query in queries]
    found = sqlite(
        [{}] * len(pairs), [real for real, _ in pairs], [other for _, other in pairs],
        database=str(directory / "geography.sqlite"),
    )  # fmt: skip
    assert found == [same_rows(directory / "geography.sqlite", *pair) for pair in pairs]
    right = [sum(found[start : start + len(queries)]) for start in range(0, len(pairs), len(queries))]
    assert len(queries) - 10 < right[0] <= len(queries)
    assert right[3] == right[0] > right[2] > 0
    assert right[0] > 10 * right[1]


def same_rows(database: Path, real: str, synthetic: str) -> float:
    """Compare two queries' sorted rows, without any of the judge's code."""
    try:
        with sqlite3.connect(database) as connection:
            one, other = (sorted(map(repr, connection.execute(query).fetchall())) for query in (real, synthetic))
    except sqlite3.Error:
        return 0.0
    return float(one == other)
