"""The headline metrics of runs as a radar chart."""

import math

from sail_align.align.stats.charts import COLOURS, styled_figure, to_svg
from sail_align.align.stats.tables import one_line
from sail_align.evaluate.report.overview import Panel
from sail_align.evaluate.results.scores import Record
from sail_align.evaluate.tasks.task import find_task

LETTERS = 19
"""Longer names are cut on the chart."""
MARKERS = {
    "line-1": ("o", "●"),
    "line-2": ("s", "■"),
    "line-3": ("^", "▲"),
    "line-4": ("D", "◆"),
    "line-5": ("v", "▼"),
    "line-6": ("P", "✚"),
    "reported": (".", "•"),
}
"""Shapes that distinguish models without their colours, by style: for matplotlib, and as text."""


def radar_chart(panel: Panel) -> str | None:
    """Draw the scores of a table from 0 in the middle to 100 at the rim, with one axis per column.

    Chance is a dashed line. Scores of papers are dots on the axes where they can be compared. A line has a gap where
    its run has no score. Diagnostic tasks and corrected similarities are left out.

    Returns:
        The chart as SVG. None if there are fewer than three axes, if all are of one set, or if no run has a score on
        each.
    """
    places = [place for place, each in enumerate(panel.columns) if _is_on_radar(each.record)]
    columns = [panel.columns[place] for place in places]
    rows = [(row, [row.cells[place][0] for place in places]) for row in panel.rows]
    is_complete = any(row.kind == "run" and None not in values for row, values in rows)
    if len(columns) < 3 or len({column.mark for column in columns}) < 2 or not is_complete:
        return None
    names = [(column.record["dataset"], f"{column.metric['label']} ({column.mark})") for column in columns]
    names = [(one_line(name), one_line(label)) for name, label in names]
    labels = ["\n".join(name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name in pair) for pair in names]
    turns = [math.tau * number / len(columns) for number in range(len(columns))]
    with styled_figure(580, 380) as figure:
        between_axes = math.degrees(turns[1] / 2)
        axes = figure.add_subplot(
            projection="polar", theta_offset=math.pi / 2, theta_direction=-1, rlabel_position=between_axes
        )
        axes.set_xticks(turns, labels)
        axes.tick_params("x", pad=12)
        for label, turn in zip(axes.get_xticklabels(), turns, strict=True):
            side = round(math.sin(turn), 3)
            label.set_parse_math(False)
            label.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
        axes.set_yticks((25, 50, 75, 100))
        axes.set_ylim(0, 100)
        for order, (row, values) in enumerate(reversed(rows)):  # chance is below all others, the first run on top
            points = [math.nan if value is None else value for value in values]
            colour = COLOURS[row.style]
            if row.kind != "reported":
                line = "--" if row.kind == "chance" else "-"
                axes.plot([*turns, 0], [*points, points[0]], line, color=colour, zorder=3 + order)
            if row.kind != "chance":
                axes.scatter(
                    turns,
                    points,
                    s=40,
                    marker=MARKERS[row.style][0],
                    color=colour,
                    edgecolor=COLOURS["card"],
                    clip_on=False,
                    zorder=3.5 + order,
                )
        described = ", ".join(map(" ".join, names))
        return to_svg(
            figure, f"Radar chart, from 0 to 100, of {described}. The bars below show the numbers.", inline=True
        )


def _is_on_radar(record: Record) -> bool:
    task = find_task(record["task"])
    return not task.diagnostic and task.corrected not in record.get("variants", ())
