"""Every number of the documents that comes from a run is in the JSON which that run wrote.

`<!-- numbers: step-cpu.json, evidence/*.json -->` names files of scripts/bench/results for the text up to the next
marker or heading; `<!-- numbers: none, REASON -->` says why that text has no number from a run.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

RESULTS = ROOT / "scripts/bench/results"
DOCS = ROOT / "docs"
RAW = 100  # a longer list is raw data: among so many values any number would be found

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
BOUNDARY = re.compile(r"^(?:<!-- numbers: (.+) -->|#+ .+)$", re.MULTILINE)
# Settings and names: code, targets of links, headers and first cells of tables.
NAMES = re.compile(r"`[^`]*`|\]\([^)]*\)|^\|.*\n(?=\|-)|(?<=^\|)[^|\n]*", re.MULTILINE)
# Not digits of fp32, ZeRO-2, 2.13.0 or 2026-11-27.
NUMBER = re.compile(r"(?<![\w.,-])([−+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?)(?!-?\w|[.,]\d)(\s?[%×])?")


def parts(document: str) -> list[tuple[str | None, str]]:
    """Split a document at markers and headings; returns what each marker says, None without one, and the text."""
    pieces = BOUNDARY.split(FENCED.sub("", document))
    return [(None, pieces[0]), *zip(pieces[1::2], pieces[2::2], strict=True)]


def quoted(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each number that must be in the JSON, and whether it is in percent."""
    for line in NAMES.sub("", text).splitlines():
        for number, sign in NUMBER.findall(line):
            if line.startswith("|") or "." in number or sign:
                yield number, "%" in sign


def values(content: Any) -> Iterator[float]:
    """Yield the numbers of a JSON document."""
    if isinstance(content, dict) or (isinstance(content, list) and len(content) <= RAW):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from values(entry)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


def without_source(text: str, files: list[Path]) -> list[str]:
    """Return the numbers of a text that are no value of these files, rounded as the text shows it."""
    known = [value for file in files for value in values(json.loads(file.read_text(encoding="utf-8")))]

    def is_known(number: str, *, percent: bool) -> bool:
        plain = number.replace(",", "").replace("−", "-")
        form = f".{len(plain.partition('e')[0].partition('.')[2])}{'e' if 'e' in plain else 'f'}"
        candidates = [*known, *(100 * value for value in known)] if percent else known
        return any(float(format(value, form)) == float(plain) for value in candidates)

    return [number for number, percent in quoted(text) if not is_known(number, percent=percent)]


DOCUMENTS = {path.name: parts(path.read_text(encoding="utf-8")) for path in [ROOT / "README.md", *DOCS.glob("*.md")]}
MARKED = [
    pytest.param(marker, text, id=f"{name}, {marker}")
    for name, found in sorted(DOCUMENTS.items())
    for marker, text in found
    if marker and not marker.startswith("none, ")
]


@pytest.mark.parametrize(("marker", "text"), MARKED)
def test_every_number_of_a_run_is_in_its_json(marker: str, text: str) -> None:
    files = {name: [*RESULTS.glob(name)] for name in marker.split(", ")}
    missing = [name for name, found in files.items() if not found]
    assert not missing, f"not in {RESULTS.relative_to(ROOT)}"
    assert not without_source(text, [*chain.from_iterable(files.values())])


@pytest.mark.parametrize("name", ["measurements.md", "gpu.md", "evidence.md"])
def test_every_section_has_a_marker(name: str) -> None:
    sections = re.findall(r"^## (.+)\n+(.*)", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert sections
    assert not [heading for heading, first in sections if not first.startswith("<!-- numbers: ")]


def test_a_paragraph_that_quotes_measurements_is_marked() -> None:
    unmarked = [
        f"{name}: {paragraph}"
        for name in ("README.md", "faq.md", "guide.md")
        for marker, text in DOCUMENTS[name]
        for paragraph in text.split("\n\n")
        if marker is None
        and re.search(r"\((docs/)?(measurements|gpu|evidence)\.md", paragraph)
        and any(quoted(paragraph))
    ]
    assert not unmarked


RIGHT = """6.6 × the speed, 28% and 99.9% of all, −0.095 nats, with
`beta: 0.3`, torch 2.13.0 and fp32. 30 rounds.

| 12 seeds | 5e-7 | 1 |
|---|---|---|
| after 9 | 1,024 | 1.2e-6 |
"""
RUN = {"speed": [6.63], "share": 0.2757, "all": 99.87, "nats": -0.0951, "tokens": 1024, "error": 1.23e-6, "ok": True}


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"raw": [number / 10 for number in range(1000)]}))
    return [tmp_path / "run.json"]


def test_right_numbers_are_found(run: list[Path]) -> None:
    assert [number for number, _ in quoted(RIGHT)] == ["6.6", "28", "99.9", "−0.095", "1,024", "1.2e-6"]
    assert not without_source(RIGHT, run)


@pytest.mark.parametrize(
    "wrong", ["6.7", "6.63001", "27%", "99.8%", "0.095", "−0.096", "66 ×", "| a | 1,025", "| a | 1"]
)
def test_a_wrong_number_is_found(wrong: str, run: list[Path]) -> None:
    assert without_source(f"{RIGHT}\n{wrong}\n", run) == [re.sub(r"[|a%× ]", "", wrong)]


def test_a_marker_ends_at_the_next_heading_or_marker() -> None:
    text = "<!-- numbers: a.json -->\n1\n```\n# 2\n```\n3\n## b\n4\n<!-- numbers: none, plans -->\n5"
    assert [(marker, part.split()) for marker, part in parts(text)] == [
        (None, []), ("a.json", ["1", "3"]), (None, ["4"]), ("none, plans", ["5"]),
    ]  # fmt: skip
