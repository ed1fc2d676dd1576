"""One self-contained HTML page: no network, no script but its own, every text escaped."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from spin_plugin.objective.decline import REMEDIES
from spin_plugin.objective.metrics import METRICS
from spin_plugin.report.chart import Band, Line, Point, line_chart, number, sparkline
from spin_plugin.report.curves import Curve
from spin_plugin.report.measures import GROUPS, Measure, lm_eval_measures, look_up
from spin_plugin.run.stop import Best

LONGEST_TEXT = 3000
"""Characters of a text in the page; report.jsonl has all of it."""
GRID_BYTES = 14_000_000
"""How large the grid's data may become; prompts beyond it are left out."""


class Figure(NamedTuple):
    """A chart of one or two metrics, and what to do about what it shows."""

    title: str
    lines: dict[str, tuple[str, str]]
    """Metric → label and color of its line."""
    advice: str
    bounds: tuple[float, float] | None = None


FIGURES = [
    Figure(
        "Rewards",
        {"reward_real": ("real", "real"), "reward_synthetic": ("synthetic", "synthetic")},
        f"If real is below 0, the model only unlearns its own responses; {REMEDIES}.",
    ),
    Figure(
        "Reward margin",
        {"reward_margin": ("margin", "both")},
        "It also rises while both rewards fall, so read it beside them.",
    ),
    Figure(
        "Accuracy",
        {"accuracy": ("accuracy", "both")},
        "Near 1 within the first epoch: this opponent has little left to teach; train fewer epochs per iteration.",
        (0.0, 1.0),
    ),
    Figure(
        "Loss",
        {"loss": ("loss", "both")},
        "Flat: learning_rate is too low, or the opponent already writes like the data. Rising: it is too high.",
    ),
    Figure(
        "Log-probs per token",
        {"logp_real_per_token": ("real", "real"), "logp_synthetic_per_token": ("synthetic", "synthetic")},
        "Real should not fall. Where both meet, the opponent's responses are as likely as the data.",
    ),
    Figure(
        "Saturated pairs",
        {"saturated": ("saturated", "both")},
        "If most are long before the end, train fewer epochs per iteration.",
        (0.0, 1.0),
    ),
]

TILES = {
    "reward margin": ("metrics", "spin/reward_margin"),
    "accuracy": ("metrics", "spin/accuracy"),
    "real reward": ("metrics", "spin/reward_real"),
    "synthetic reward": ("metrics", "spin/reward_synthetic"),
    "held-out real, change per token": ("held_out", "difference"),
}


class Drawn(NamedTuple):
    """A chart on the page."""

    title: str
    svg: Markup
    meanings: list[tuple[str, str, str]]
    """Label, color and meaning of each line."""
    advice: str
    metrics: str
    """The metrics of its lines, for the readout."""


def render(content: Mapping[str, Any], curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        content: what report.json holds.
        curves: the training log of each iteration.
        rows: the grid (`grid.Row.as_dict`).
    """
    here = files("spin_plugin.report")
    html, style, script = (here.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    iterations = content["iterations"]
    finished = [entry for entry in iterations if entry["state"].startswith("finished")]
    shown = [entry for entry in iterations if entry["state"] != "not started"]
    grid_rows = _fitting(rows)
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template.filters |= {"code": _code, "sentence": _sentence}
    return template.from_string(html).render(
        **{**content, "best": content["best"] and Best(**content["best"])},
        finished=finished,
        shown=shown,
        tiles=_tiles(finished),
        drawn=[chart for figure in FIGURES if (chart := draw(figure, curves))],
        groups=_groups(shown),
        shown_rows=len(grid_rows),
        config_text=_yaml(content["config"]),
        resolved={entry["iteration"]: _yaml(entry["config"]) for entry in shown if entry.get("config")},
        grid=Markup(f'{{"numbers":{[entry["iteration"] for entry in shown]},"rows":[{",".join(grid_rows)}]}}'),
        readout=embedded(_readout(curves)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def draw(figure: Figure, curves: Sequence[Curve]) -> Drawn | None:
    """Draw a chart; None if the log has none of its metrics."""
    lines = []
    for metric, (label, color) in figure.lines.items():
        trend = [run for curve in curves if (run := _points(curve.trend, metric))]
        if trend:
            lines.append(Line(label, color, trend, [_points(curve.points, metric) for curve in curves]))
    if not lines:
        return None
    bands = [Band(f"t = {curve.iteration}", curve.start, curve.end) for curve in curves]
    meanings = [(label, color, METRICS[metric].meaning) for metric, (label, color) in figure.lines.items()]
    metrics = " ".join(f"spin/{metric}" for metric in figure.lines)
    return Drawn(figure.title, line_chart(figure.title, lines, bands, figure.bounds), meanings, figure.advice, metrics)


def _points(entries: Sequence[Mapping[str, float]], metric: str) -> list[Point]:
    name = f"spin/{metric}"
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def _readout(curves: Sequence[Curve]) -> list[dict[str, float]]:
    """Return the points that a chart reads out under the pointer, to four significant digits."""
    return [
        {"t": curve.iteration} | {name: float(f"{value:.4g}") for name, value in point.items()}
        for curve in curves
        for point in curve.points
    ]


def _tiles(finished: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Markup]]:
    """Return the newest values that matter, each with its course over the iterations."""
    tiles = []
    for name, path in TILES.items():
        values = [look_up(entry, *path) for entry in finished]
        if values and values[-1] is not None:
            tiles.append(
                (name, _signed(values[-1]) if path[-1] != "spin/accuracy" else number(values[-1]), sparkline(values))
            )
    return tiles


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _groups(entries: list[dict[str, Any]]) -> dict[str, list[tuple[Measure, list[str], Markup]]]:
    """Return the table: measures with a value in any iteration, as text, with their course."""
    groups = {}
    for title, measures in {**GROUPS, "Benchmarks": lm_eval_measures(entries)}.items():
        rows = []
        for measure in measures:
            values = [measure.value(entry) for entry in entries]
            if any(value is not None for value in values):
                texts = [
                    "" if value is None else value if isinstance(value, str) else measure.show(value)
                    for value in values
                ]
                numbers = [value if isinstance(value, float | int) else None for value in values]
                rows.append((measure, texts, sparkline(numbers)))
        if rows:
            groups[title] = rows
    return groups


def _fitting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return as many rows, as JSON with shortened texts, as the page holds."""
    fitting: list[str] = []
    left = GRID_BYTES
    for row in rows:
        encoded = embedded(_shortened(row))
        left -= len(encoded.encode())
        if left < 0:
            break
        fitting.append(encoded)
    return fitting


def _shortened(value: Any) -> Any:
    """Cut the texts of a row; `more` says how many characters were cut: of a prompt the first ones."""
    if isinstance(value, Mapping):
        return {
            key: _cut(item, end=key == "prompt") if key in ("prompt", "real", "text") else _shortened(item)
            for key, item in value.items()
        }
    return [_shortened(item) for item in value] if isinstance(value, list) else value


def _cut(text: str, *, end: bool) -> dict[str, Any]:
    shown = text[-LONGEST_TEXT:] if end else text[:LONGEST_TEXT]
    return {"text": shown, "more": len(text) - len(shown)}


def embedded(value: Any) -> Markup:
    """Return JSON that is safe inside a script element, and in UTF-8 even with lone surrogates."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def _yaml(config: Any) -> str:
    return yaml.safe_dump(config, sort_keys=True, allow_unicode=True)


def _code(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _sentence(text: str) -> str:
    """Write a message, which elsewhere is a part of a line, as a sentence."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _digest(content: str) -> str:
    """Return the hash by which the page's policy allows exactly this style or script."""
    return b64encode(hashlib.sha256(content.encode()).digest()).decode()
