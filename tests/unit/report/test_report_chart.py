"""Charts: axes, lines and their labels, as numbers in the SVG."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_plugin.report.chart import (
    HEIGHT,
    LABEL_GAP,
    LEFT,
    RIGHT,
    WIDTH,
    Band,
    Line,
    line_chart,
    number,
    sparkline,
    ticks,
)
from spin_plugin.report.curves import pool

VALUES = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(VALUES, VALUES)
def test_ticks_cover_the_values_evenly_and_are_few(one: float, other: float) -> None:
    low, high = sorted((one, other))
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7
    tolerance = 1e-6 * (marks[1] - marks[0]) + 1e-9 * abs(high)
    assert marks[0] <= low + tolerance
    assert marks[-1] >= high - tolerance
    gaps = [after - before for before, after in pairwise(marks)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.5, "0.5"), (-0.12345, "−0.1235"), (12.3456, "12.35"), (1234567, "1,234,567"), (-2e-5, "−2.0e−05")],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


def chart(lines: list[Line], bands: list[Band]) -> ET.Element:
    return ET.fromstring(line_chart("rewards", lines, bands, None))


def coordinates(line: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_points_lie_where_the_axes_say() -> None:
    drawn = chart(
        [Line("real", "real", [[(0, 0.0), (50, 1.0)], [(50, 0.0), (100, -1.0)]])],
        [Band("t = 0", 0, 50), Band("t = 1", 50, 100)],
    )
    first, second = (coordinates(line) for line in drawn.iter("polyline"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert [x for x, _ in first + second] == [LEFT, middle, middle, WIDTH - RIGHT]
    ticks_at = {text.text: float(text.attrib["y"]) - 4 for text in drawn.iter("text") if text.attrib["class"] == "end"}
    assert [y for _, y in first + second] == [ticks_at[mark] for mark in ("0", "1", "0", "−1")]
    assert {text.text for text in drawn.iter("text")} >= {"t = 0", "t = 1", "steps", "real"}
    assert drawn.attrib["aria-label"] == "rewards; at the end: real −1"


def test_labels_of_close_lines_do_not_overlap_nor_leave_the_chart() -> None:
    lines = [Line(name, "real", [[(0, 0.0), (9, value)]]) for name, value in (("a", 0.0), ("b", 0.001), ("c", 0.002))]
    drawn = chart([*lines, Line("top", "both", [[(0, 5.0), (9, 5.0)]])], [Band("t = 0", 0, 9)])
    heights = sorted(float(text.attrib["y"]) for text in drawn.iter("text") if text.attrib["class"].startswith("label"))
    gaps = [after - before for before, after in pairwise(heights)]
    assert min(gaps) >= LABEL_GAP - 0.11  # rounding
    assert max(heights) < HEIGHT


def test_names_are_escaped() -> None:
    drawn = chart([Line('<b> & "', "real", [[(0, 0.0)]])], [Band("t", 0, 1)])
    assert '<b> & "' in [text.text for text in drawn.iter("text")]


def test_sparkline_needs_two_values_and_survives_equal_ones() -> None:
    assert not sparkline([None, 1.0])
    (line,) = ET.fromstring(sparkline([1.0, None, 1.0])).iter("polyline")
    assert [y for _, y in coordinates(line)] == [12.0, 12.0]


def test_pooling_weighs_by_pairs_and_leaves_out_what_is_not_finite() -> None:
    entries = [
        {"step": 1, "pairs": 1, "spin/loss": 1.0, "spin/accuracy": math.nan},
        {"step": 2, "pairs": 3, "spin/loss": 5.0},
        {"step": 3, "pairs": 2, "spin/loss": 7.0, "spin/accuracy": 0.5},
    ]
    assert pool(entries, 2) == [{"step": 2, "spin/loss": 4.0}, {"step": 3, "spin/loss": 7.0, "spin/accuracy": 0.5}]
    assert pool([], 2) == []
    assert len(pool([{"step": step, "pairs": 1} for step in range(1001)], 200)) <= 200
