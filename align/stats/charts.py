"""Line charts and dot charts as inline SVG; colours come from the page's CSS, for both themes.

`standalone` makes one a file by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
POINTS = 400
ROW, NAMES = 26, 216
"""Of a dot chart: the height of a row, and the width of its names."""
COLOURS = ("#1f5fd0", "#c25a00", "#1a7f46", "#8a3ab9", "#5f6670", "#b3261e")
"""Of `line-1`, `line-2` … where a chart stands alone."""


@dataclass(frozen=True)
class Series:
    """A named line; `style` is a CSS class: `line-1`, `line-2` …"""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Dots:
    """Named values, one a row, each with what it is off by either way."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def line_chart(series: Sequence[Series], x_label: str, y_label: str, *, may_be_log: bool = False) -> Markup:
    """Draw series over a common x; with `may_be_log`, y is logarithmic if the values span more than a factor of 20."""
    series = [Series(each.name, _thinned(each.points), each.style) for each in series]
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    logarithmic = may_be_log and min(ys) > 0 and max(ys) > 20 * min(ys)
    x_axis = _Axis(ticks(0, max(xs)), LEFT, WIDTH - RIGHT)
    y_ticks = log_ticks(min(ys), max(ys)) if logarithmic else ticks(min(0.0, *ys), max(ys))
    y_axis = _Axis(y_ticks, HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">'
    ]
    for value in x_axis.ticks:
        x = x_axis(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:,g}</text>')
    for value in y_axis.ticks:
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for each in series:
        line = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in each.points)
        parts.append(f'<polyline class="line {each.style}" points="{line}"/>')
        if len(each.points) <= 40:
            parts += [
                f'<circle class="dot {each.style}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.5"/>'
                for x, y in each.points
            ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    scale = " (log scale)" if logarithmic else ""
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}{scale}</text></svg>"
    )
    return Markup("".join(parts))


def dot_chart(rows: Sequence[str], series: Sequence[Dots], x_label: str) -> Markup:
    """Draw a row for each name, with a dot and a whisker of each series."""
    bottom = TOP + ROW * len(rows)
    axis = _Axis(ticks(0, max(value + off for each in series for value, off in each.points)), NAMES, WIDTH - RIGHT)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{escape(x_label)}">']
    for value in axis.ticks:
        x = axis(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for number, name in enumerate(rows):
        y = TOP + ROW * (number + 0.5)
        parts.append(f'<text x="{NAMES - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for place, each in enumerate(series):
            value, off = each.points[number]
            at = y + 6 * (place - (len(series) - 1) / 2)
            low, high = axis(max(value - off, 0)), axis(value + off)
            parts.append(
                f'<polyline class="line {each.style}" points="{low:.1f},{at:.1f} {high:.1f},{at:.1f}"/>'
                f'<circle class="dot {each.style}" cx="{axis(value):.1f}" cy="{at:.1f}" r="3"/>'
            )
    parts.append(
        f'<text class="label" x="{(NAMES + WIDTH - RIGHT) / 2}" y="{bottom + 40}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )
    return Markup("".join(parts))


def standalone(chart: Markup, names: Sequence[str]) -> str:
    """Return a chart as a file of its own: on white, with the names of `line-1`, `line-2` … above it."""
    drawn = str(chart)  # the methods of Markup escape what they are given
    height = float(drawn.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
    rules = [
        f"polyline.line-{number} {{ stroke: {colour}; }} circle.line-{number} {{ fill: {colour}; }}"
        for number, colour in enumerate(COLOURS[: len(names)], start=1)
    ]
    key, x = [], float(LEFT)
    for number, name in enumerate(names, start=1):
        key.append(f'<circle class="line-{number}" cx="{x:.1f}" cy="14" r="4"/>')
        key.append(f'<text x="{x + 9:.1f}" y="18">{escape(name)}</text>')
        x += 30 + 6.5 * len(name)
    style = (
        "text { font: 12px sans-serif; fill: #5f6670; } .label { fill: #1c1f23; font-size: 13px; } "
        f".grid {{ stroke: #e6e8eb; }} .line {{ fill: none; stroke-width: 2; }} {' '.join(rules)}"
    )
    inner = drawn.replace("<svg ", f'<svg x="0" y="24" width="{WIDTH}" height="{height:g}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + 24:g}" width="{WIDTH}" '
        f'height="{height + 24:g}"><style>{style}</style><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(key)}{inner}</svg>\n"
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round values that span low … high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that span low … high, low > 0."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


class _Axis:
    """Maps values to pixels so that the ticks fill the axis."""

    def __init__(self, ticks: list[float], start: float, stop: float, logarithmic: bool = False):
        self.ticks = ticks
        self._scale = math.log10 if logarithmic else float
        self._low, self._high = self._scale(ticks[0]), self._scale(ticks[-1])
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of blocks of points, so that a long run's curve stays small."""
    block = max(1, -(-len(points) // POINTS))
    groups = [points[start : start + block] for start in range(0, len(points), block)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
