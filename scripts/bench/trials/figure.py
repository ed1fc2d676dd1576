"""Score over compute as SVG, one panel per score. Readable on white and on black, the same on every machine."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from spin_plugin.report.chart import Point, Scale, number, ticks

WIDTH, HEIGHT = 330, 250
"""Of a panel's axes."""
LEFT, TOP, BOTTOM, GAP = 40, 30, 40, 46
KEY = 18
"""Height of a line of the key, which has two columns."""
COLORS = {
    "spin": "#1f6feb",
    "sft": "#d1570a",
    "dft": "#b58900",
    "dpo": "#7d4fc4",
    "sdft": "#c0399f",
    "spin-decay": "#0550ae",
    "spin-decay-space": "#0a7ea4",
    "spin-low": "#6e40c9",
    "spin-history0": "#2aa198",
    "spin-judge": "#238636",
    "spin-judge-long": "#3fb950",
    "spin-judge-sft_weight": "#7c8c03",
    "spin-judge-many": "#116329",
    "spin-judge-many-sft_weight": "#9a6700",
    "spin-judge-many-sft_weight-fast": "#d4a72c",
    "spin-space": "#57a6ff",
    "spin-real_penalty": "#8c959f",
    "spin-sft_weight": "#c93c37",
    "spin-sft_weight-fast": "#e5534b",
}
BANDS = ("spin", "sft")
"""The methods whose range over the seeds is shown."""


class Curve(NamedTuple):
    """A method's course."""

    label: str
    method: str
    seeds: Sequence[Sequence[Point]]
    """For each seed, points (compute, score); all seeds have the same number of points."""

    def mean(self) -> list[Point]:
        return [(fmean(x for x, _ in points), fmean(y for _, y in points)) for points in zip(*self.seeds, strict=True)]

    def outline(self) -> list[Point]:
        """The smallest scores from left to right, then the largest from right to left."""
        columns = [(fmean(x for x, _ in points), [y for _, y in points]) for points in zip(*self.seeds, strict=True)]
        return [(x, min(ys)) for x, ys in columns] + [(x, max(ys)) for x, ys in reversed(columns)]


def figure(panels: Mapping[str, Sequence[Curve]]) -> str:
    """Draw the curves of each score side by side, with one key.

    Args:
        panels: by title, the curves; every panel has the same methods.
    """
    methods = next(iter(panels.values()))
    width = LEFT + len(panels) * (WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM + KEY * ((len(methods) + 1) // 2) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#888">'
    ]
    for place, (title, curves) in enumerate(panels.items()):
        parts += _panel(title, curves, LEFT + place * (WIDTH + GAP))
    parts.append(_text(width / 2, TOP + HEIGHT + 32, "compute; 1 is that of SPIN", "middle"))
    parts += _key(methods, TOP + HEIGHT + BOTTOM + 12)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(title: str, curves: Sequence[Curve], left: float) -> Iterator[str]:
    largest = max(1.0, *(round(share, 1) for curve in curves for share, _ in curve.mean()))
    values = [y for curve in curves for seed in curve.seeds for _, y in seed]
    marks = ticks(min(values), max(values))
    x = Scale(0, 1.02 * largest, left, left + WIDTH)
    y = Scale(marks[0], marks[-1], TOP + HEIGHT, TOP)
    yield _text(left, TOP - 12, f"{title}, %", "start")
    for mark in marks:
        yield f'<path d="M{left} {y(mark):.1f}h{WIDTH}" stroke="#888" stroke-opacity="0.3"/>'
        yield _text(left - 6, y(mark) + 4, number(mark), "end")
    for share in (tick for tick in ticks(0, largest) if tick <= largest):
        yield _text(x(share), TOP + HEIGHT + 16, number(share), "middle")
    for curve in curves:
        if curve.method in BANDS:
            yield f'<polygon points="{_points(curve.outline(), x, y)}" fill="{COLORS[curve.method]}" opacity="0.12"/>'
    for curve in reversed(curves):  # the first ones on top
        style = _style(curve.method)
        yield f'<polyline points="{_points(curve.mean(), x, y)}" fill="none" {style}/>'


def _key(curves: Sequence[Curve], top: float) -> Iterator[str]:
    for place, curve in enumerate(curves):
        left, down = LEFT + (place % 2) * (WIDTH + GAP), top + KEY * (place // 2)
        yield f'<path d="M{left} {down}h24" {_style(curve.method)}/>'
        yield _text(left + 32, down + 4, curve.label, "start")


def _style(method: str) -> str:
    main = method in BANDS
    dashes = ' stroke-dasharray="5 3"' if method.startswith("spin-") else ""
    return f'stroke="{COLORS[method]}" stroke-width="{2.5 if main else 1.5}"{dashes}'


def _points(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
