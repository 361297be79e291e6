"""Line charts and dot charts, drawn with matplotlib in one style and written as SVG.

matplotlib is imported when the first chart is drawn. Neither pyplot nor matplotlib's global settings are used.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

COLOURS = {
    "line-1": "#1f5fd0",
    "line-2": "#b45309",
    "line-3": "#17703e",
    "line-4": "#7e3ab0",
    "line-5": "#0e7490",
    "line-6": "#be185d",
    "reported": "#868d97",
    "chance": "#b3261e",
    "ink": "#1b1d20",
    "soft": "#565c66",
    "rule": "#dcdee2",
    "card": "#ffffff",
}
"""Colours of a chart by their name. An inline chart refers to the page's CSS variable of that name instead."""

STYLE: Any = {  # rc_context's type of the keys differs between matplotlib's versions
    "axes.autolimit_mode": "round_numbers",  # axes end at ticks
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["rule"],
    "axes.grid": True,
    "axes.labelcolor": COLOURS["ink"],
    "axes.labelsize": 13,
    "axes.prop_cycle": f"cycler('color', {[COLOURS[f'line-{n}'] for n in range(1, 7)]})"
    " + cycler('linestyle', ['-', '--', '-', '--', '-', '--'])",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "figure.facecolor": COLOURS["card"],
    "font.size": 12,
    "grid.color": COLOURS["rule"],
    "legend.frameon": False,
    "lines.dashed_pattern": (3.5, 1.5),
    "lines.markersize": 5,
    "lines.linewidth": 2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sail-align",  # the same chart gets the same bytes
    "text.color": COLOURS["soft"],
    "xtick.color": COLOURS["soft"],
    "xtick.major.size": 0,
    "ytick.color": COLOURS["soft"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}

MAX_POINTS = 400


@contextmanager
def styled_figure(width: float, height: float) -> Iterator["Figure"]:
    """Yield an empty figure of a size in pixels; draw it and call `to_svg` inside the `with` block."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure((width / 72, height / 72), layout="constrained")


def to_svg(figure: "Figure", label: str, *, inline: bool = False) -> str:
    """Return a figure as SVG.

    Args:
        figure: From `styled_figure`.
        label: Describes the chart to screen readers.
        inline: Return an `<svg class="chart">` element for an HTML page. Its size and colours are those of the page.
    """
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=inline, metadata=metadata)
    svg = file.getvalue().replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    if not inline:
        return svg
    svg = svg[svg.index("<svg ") :].replace("<svg ", '<svg class="chart" ', 1)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # not referred to, and not unique in a page of several charts
    names = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
    return re.sub("|".join(names), lambda found: names[found[0]], svg)


def line_chart(
    series: Mapping[str, Points], x_label: str, y_label: str, *, allow_log: bool = False, inline: bool = False
) -> str:
    """Draw named series of (x, y) as lines; return the SVG.

    Args:
        series: Points by the name of their line. Points beyond `MAX_POINTS` are averaged in blocks.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        allow_log: Use a logarithmic y axis if the values are positive and span more than a factor of 20.
        inline: See `to_svg`.
    """
    ys = [y for points in series.values() for _, y in points]
    logarithmic = allow_log and min(ys) > 0 and max(ys) > 20 * min(ys)
    with styled_figure(520, 300) as figure:
        axes = figure.add_subplot()
        for name, points in series.items():
            averaged = _average_blocks(points)
            axes.plot(
                *zip(*averaged, strict=True), marker="o" if len(averaged) <= 40 else "", clip_on=False, label=name
            )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:,g}")
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, *ys))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(f"{y_label} (log scale)" if logarithmic else y_label)
        figure.legend(loc="outside upper left", ncols=len(series))
        return to_svg(figure, f"{y_label} over {x_label}", inline=inline)


def dot_chart(rows: Sequence[str], series: Mapping[str, Points], x_label: str) -> str:
    """Draw one row per name, with a dot and a whisker for each series; return the SVG.

    Args:
        rows: Names of the rows, from top to bottom.
        series: (value, error) of each row, by the name of the series.
        x_label: Label of the values.
    """
    with styled_figure(520, 80 + 26 * len(rows)) as figure:
        axes = figure.add_subplot()
        for number, (name, points) in enumerate(series.items()):
            values, errors = zip(*points, strict=True)
            shift = 0.22 * (number - (len(series) - 1) / 2)
            places = [row + shift for row in range(len(rows))]
            axes.errorbar(values, places, xerr=errors, marker="o", linestyle="", clip_on=False, label=name)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        figure.legend(loc="outside upper left", ncols=len(series))
        return to_svg(figure, x_label)


def _average_blocks(points: Points) -> Points:
    """Return the means of blocks of points, so that the curve of a long run stays small."""
    size = max(1, -(-len(points) // MAX_POINTS))
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks]
