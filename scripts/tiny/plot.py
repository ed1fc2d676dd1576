"""Plot the tiny run's exact match per iteration, for evaluate.py."""

from math import ceil, floor

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 44, 122, 16, 32
SERIES = {"in-domain": "#1f6feb", "out-of-domain": "#d1570a"}

Row = tuple[str, list[float]]


def plot(table: list[Row]) -> str:
    """Return the plot as SVG; gray text and lines are readable on white and on black.

    Args:
        table: for each model its name, and its exact match in percent in the order of `SERIES`.
    """
    percents = [percent for _, values in table for percent in values]
    lowest, highest = 10 * floor(min(percents) / 10), 10 * ceil(max(percents) / 10)

    def height_of(percent: float) -> float:
        return TOP + (highest - percent) / max(highest - lowest, 1) * (HEIGHT - TOP - BOTTOM)

    step = (WIDTH - LEFT - RIGHT) / max(len(table) - 1, 1)
    across = [LEFT + number * step for number in range(len(table))]
    parts = []
    for percent in range(lowest, highest + 1, 10):
        y = height_of(percent)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#888" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>')
    for x, (name, _) in zip(across, table, strict=True):
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{name}</text>')
    for number, (name, color) in enumerate(SERIES.items()):
        heights = [height_of(values[number]) for _, values in table]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, heights, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        end = f"{name} {table[-1][1][number]:.1f}%"
        parts.append(
            f'<text x="{across[-1] + 8:.1f}" y="{heights[-1] + 2 + 6 * number:.1f}" style="fill:{color}">{end}</text>'
        )
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="#888">'
    return "\n".join([opening, *parts, "</svg>"]) + "\n"
