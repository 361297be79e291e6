"""Several measures as a radar chart of inline SVG, and the shapes that tell runs apart without their colours."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from sail_align.evaluate.report.overview import Panel
from sail_align.evaluate.tasks.task import find_task

RADIUS = 140
LETTERS = 19
"""A longer name is cut on the chart; the pointer shows all of it, and so do the bars."""
SHAPES = {
    "line-1": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "line-2": "M-3.6-3.6h7.2v7.2h-7.2z",
    "line-3": "M0-5L4.8 3.6h-9.6z",
    "line-4": "M0-5.4L5.4 0 0 5.4-5.4 0z",
    "line-5": "M0 5L4.8-3.6h-9.6z",
    "line-6": "M-1.6-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "reported": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
}


def marker(style: str) -> Markup:
    """Return the shape and colour of a row, to stand before its name."""
    shape = f'<path class="mark {style}" d="{SHAPES[style]}"/>'
    return Markup(f'<svg class="marker" viewBox="-6 -6 12 12" aria-hidden="true">{shape}</svg>')


def radar_chart(panel: Panel) -> Markup | None:
    """Draw the scores of a table's rows from 0 in the middle to 100 at the rim, one axis a column.

    Chance is a line too. What papers report are dots, on the axes that they can be compared on. A line has a gap where
    its run has no score. Diagnostic tasks are left out.

    Returns:
        The chart; None with fewer than three axes, with those of one set only, and if no run has a score on each.
    """
    axes = [place for place, column in enumerate(panel.columns) if not find_task(column.record["task"]).diagnostic]
    shown = [(row, [row.cells[place][0] for place in axes]) for row in panel.rows]
    whole = any(row.kind == "run" and None not in values for row, values in shown)
    if len(axes) < 3 or len({panel.columns[place].mark for place in axes}) < 2 or not whole:
        return None
    labels = [(each.dataset, f"{each.label} ({each.mark})") for each in map(panel.columns.__getitem__, axes)]
    turns = [math.tau * spoke / len(axes) for spoke in range(len(axes))]
    rings = (25, 50, 75, 100)
    parts = [
        '<svg class="radar" viewBox="-290 -190 580 380" role="img" aria-label="Radar chart, from 0 to 100, of '
        f'{escape(", ".join(map(" ".join, labels)))}. The numbers stand with the bars below.">',
        *(f'<circle class="grid" r="{RADIUS * ring / 100:g}"/>' for ring in rings),
        *(f'<path class="grid" d="M0 0L{_point(turn, 100)}"/>' for turn in turns),
        *(_label(turn, *label) for turn, label in zip(turns, labels, strict=True)),
        *(
            f'<text transform="translate({_point(turns[1] / 2, ring)})" text-anchor="middle">{ring}</text>'
            for ring in rings
        ),
    ]
    for row, values in reversed(shown):  # chance lies below all, the first run on top
        points = [None if value is None else _point(turn, value) for turn, value in zip(turns, values, strict=True)]
        if row.kind != "reported":
            ends = zip(points, points[1:] + points[:1], strict=True)
            sides = "".join(f"M{start}L{end}" for start, end in ends if start and end)
            parts.append(f'<path class="line {row.style}" d="{sides}"/>')
        if row.kind != "chance":
            parts += [
                f'<path class="mark {row.style}" transform="translate({point})" d="{SHAPES[row.style]}"><title>'
                f"{escape(row.name)}, {escape(' '.join(label))}: {value:.1f}</title></path>"
                for point, value, label in zip(points, values, labels, strict=True)
                if point
            ]
    return Markup("".join(parts) + "</svg>")


def _point(turn: float, percent: float) -> str:
    reach = RADIUS * percent / 100
    return f"{reach * math.sin(turn):.1f} {-reach * math.cos(turn):.1f}"


def _label(turn: float, *lines: str) -> str:
    x, y = (RADIUS + 10) * math.sin(turn), -(RADIUS + 22) * math.cos(turn)
    anchor = "middle" if abs(x) < 1 else "start" if x > 0 else "end"
    cut = (line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…" for line in lines)
    spans = "".join(
        f'<tspan x="{x:.1f}" dy="{1.1 * place:g}em">{escape(line)}</tspan>' for place, line in enumerate(cut)
    )
    return f'<text text-anchor="{anchor}" y="{y - 2:.1f}"><title>{escape(" ".join(lines))}</title>{spans}</text>'


def score_bar(value: float, chance: float | None, interval: Sequence[float] | None, style: str) -> Markup:
    """Draw a score with its interval as a line over the bar's end, and chance as a tick; the width is the page's.

    It says nothing to a screen reader: the numbers stand beside it.
    """
    parts = ['<rect class="track" width="100" height="12" y="4"/>']
    parts.append(f'<rect class="fill {escape(style)}" width="{_within(value)}" height="12" y="4"/>')
    if interval:
        line = "M{} 10H{}".format(*map(_within, interval))
        parts.append(f'<path class="halo" d="{line}"/><path class="whisker" d="{line}"/>')
    if chance is not None:
        parts.append(f'<path class="chance" d="M{_within(chance)} 0V20"/>')
    return Markup(
        f'<svg class="bar" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _within(value: float) -> str:
    return f"{min(max(value, 0.0), 100.0):.2f}"
