"""Line charts as inline SVG: axes with ticks, a label at the end of each line, a band per iteration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 88, 20, 30
LINE_HEIGHT = 13
LABEL_GAP = 2 * LINE_HEIGHT + 2
"""Units from the label of a line to that of the next, below which they would overlap."""

Point = tuple[float, float]


class Line(NamedTuple):
    """One line of a chart."""

    label: str
    color: str
    """`real`, `synthetic` or `both`: a class of page.css."""
    runs: Sequence[Sequence[Point]]
    """The points of each iteration; lines do not connect iterations, because each starts from its own opponent."""
    faint: Sequence[Sequence[Point]] = ()
    """The same with their noise."""


class Band(NamedTuple):
    """An iteration's part of the horizontal axis."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Scale:
    """A linear map from values to SVG coordinates."""

    low: float
    high: float
    first: float
    last: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / ((self.high - self.low) or 1) * (self.last - self.first)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most `most` + 1 multiples of 1, 2, 2.5 or 5 times a power of ten that cover [low, high]."""
    span = (high - low) or max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * power for size in (1, 2, 2.5, 5, 10, 20) if span / (size * power) <= most - 1)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """Format a value for a label: four significant digits, thousands separated, a real minus sign."""
    if value and abs(value) < 1e-3:
        shown = f"{value:.1e}"
    else:
        shown = f"{value:,.{max(0, min(4, 3 - math.floor(math.log10(abs(value) or 1))))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def line_chart(name: str, lines: Sequence[Line], bands: Sequence[Band], bounds: tuple[float, float] | None) -> Markup:
    """Draw lines over the steps of all iterations.

    Args:
        name: what the chart shows, for screen readers.
        lines: at least one with a point.
        bands: the iterations.
        bounds: fixed ends of the vertical axis; by default those of the values, and 0 if it is near.
    """
    values = [y for line in lines for run in (*line.runs, *line.faint) for _, y in run]
    low, high = bounds or (min(values), max(values))
    if bounds is None and low > 0 and low < (high - low):
        low = 0.0
    marks = ticks(low, high)
    x = Scale(bands[0].start, bands[-1].end, LEFT, WIDTH - RIGHT)
    y = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP, marks)
    last = ", ".join(f"{line.label} {number(line.runs[-1][-1][1])}" for line in lines if line.runs)
    parts = [*_axes(x, y, bands)]
    parts += [_path(run, x, y, f"line faint {line.color}") for line in lines for run in line.faint]
    parts += [_path(run, x, y, f"line {line.color}") for line in lines for run in line.runs]
    parts += _labels(lines, y)
    parts.append(Markup('<line class="cursor" y1="{}" y2="{}" hidden=""></line>').format(TOP, HEIGHT - BOTTOM))
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}; at the end: {}" data-left="{}" data-right="{}" '
        'data-start="{}" data-end="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, name, last, LEFT, WIDTH - RIGHT, x.low, x.high, Markup("").join(parts))


def sparkline(values: Sequence[float | None]) -> Markup:
    """Draw a value's course over the iterations; nothing if fewer than two are known."""
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return Markup("")
    heights = [value for _, value in known]
    x, y = Scale(0, len(values) - 1, 4, 76), Scale(min(heights), max(heights), 20, 4)
    if min(heights) == max(heights):
        y = Scale(heights[0] - 1, heights[0] + 1, 20, 4)
    end = Markup('<circle class="dot" cx="{}" cy="{}" r="2.5"></circle>').format(
        _at(x, known[-1][0]), _at(y, heights[-1])
    )
    return Markup('<svg class="spark" viewBox="0 0 80 24" aria-hidden="true">{}{}</svg>').format(
        _path(known, x, y, "line both"), end
    )


def _axes(x: Scale, y: Scale, bands: Sequence[Band]) -> list[Markup]:
    parts = []
    for mark in y.ticks:
        parts.append(_rule("zero" if mark == 0 else "rule", (LEFT, WIDTH - RIGHT), (_at(y, mark), _at(y, mark))))
        parts.append(_text("end", LEFT - 6, _at(y, mark) + 4, number(mark)))
    every = math.ceil(len(bands) / 6)  # labels that fit side by side
    for place, band in enumerate(bands):
        if place:
            parts.append(_rule("band", (_at(x, band.start), _at(x, band.start)), (TOP - 6, HEIGHT - BOTTOM)))
        if place % every == 0:
            parts.append(_text("middle", (x(band.start) + x(band.end)) / 2, TOP - 8, band.label))
    base = HEIGHT - BOTTOM + 16
    steps = [value for value in ticks(x.low, x.high, 4) if x.low <= value <= x.high]
    parts += [_text("middle", _at(x, value), base, number(value)) for value in steps]
    return [*parts, _text("", WIDTH - RIGHT + 12, base, "steps")]


def _labels(lines: Sequence[Line], y: Scale) -> list[Markup]:
    """Label each line at its end, moved apart where two lines end close to each other."""
    ends = sorted(((y(line.runs[-1][-1][1]), line) for line in lines if line.runs), key=lambda end: end[0])
    heights: list[float] = []
    for wanted, _ in ends:
        heights.append(max(wanted, heights[-1] + LABEL_GAP) if heights else wanted)
    over = max(0.0, heights[-1] + LINE_HEIGHT - (HEIGHT - BOTTOM)) if heights else 0.0
    parts = []
    for height, (_, line) in zip(heights, ends, strict=True):
        last = number(line.runs[-1][-1][1])
        parts.append(_text(f"label {line.color}", WIDTH - RIGHT + 8, height - over, line.label))
        parts.append(_text(f"value {line.color}", WIDTH - RIGHT + 8, height - over + LINE_HEIGHT, last))
    return parts


def _rule(kind: str, across: tuple[float, float], down: tuple[float, float]) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"></line>').format(kind, *across, *down)


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, round(x, 1), round(y, 1), text)


def _path(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> Markup:
    place = " ".join(f"{_at(x, a)},{_at(y, b)}" for a, b in points)
    return Markup('<polyline class="{}" points="{}"></polyline>').format(kind, place)


def _at(scale: Scale, value: float) -> float:
    return round(scale(value), 1)
