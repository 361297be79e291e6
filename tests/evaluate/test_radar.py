"""A radar chart says where each score lies, and what is not there."""

import math
import re

import pytest

from sail_align.evaluate.report.charts import LETTERS, RADIUS, SHAPES, radar_chart
from sail_align.evaluate.report.overview import Column, Overview, Panel, Row


def panel(*rows, names=("imagenet", "coco", "ade", "voc"), task="classification"):
    columns = [
        Column(mark, {"dataset": name, "task": task}, {"label": "top-1"})
        for mark, name in zip("abcdefgh", names, strict=False)
    ]
    drawn = [Row(name, kind, style, [(value, None) for value in values]) for name, kind, style, values in rows]
    return Panel(columns, drawn)


def run(*values, name="ours", place=0):
    return name, "run", Overview.style(place), values


CHANCE = ("chance", "chance", "chance", (25.0, 0.1, 1.0, 5.0))


def lines(chart):
    return dict(re.findall('<path class="line ([^"]+)" d="([^"]*)"/>', chart))


def marks(chart):
    found = re.findall('<path class="mark ([^"]+)" transform="translate\\(([^ ]+) ([^)]+)\\)"', chart)
    return [(style, float(x), float(y)) for style, x, y in found]


def test_each_axis_goes_from_the_middle_to_the_rim():
    chart = radar_chart(panel(run(100.0, 50.0, 0.0, 25.0), CHANCE))
    there = [(0, -RADIUS), (RADIUS / 2, 0), (0, 0), (-RADIUS / 4, 0)]
    for (_, x, y), point in zip(marks(chart), there, strict=True):
        assert (x, y) == pytest.approx(point, abs=0.06)
    assert lines(chart)["chance"].startswith(f"M0.0 {-RADIUS / 4:.1f}L")
    assert [f">{ring}</text>" in chart for ring in (25, 50, 75, 100)] == [True] * 4


def test_a_score_below_chance_lies_inside_chance():
    chart = radar_chart(panel(run(17.5, 1.0, 1.0, 1.0), CHANCE))
    (_, x, y), *_ = marks(chart)
    assert math.hypot(x, y) < RADIUS * 0.25


def test_a_line_has_a_gap_where_its_run_has_no_score():
    chart = radar_chart(panel(run(40.0, None, 40.0, 40.0), run(9.0, 9.0, 9.0, 9.0, place=1), CHANCE))
    drawn = lines(chart)
    assert drawn["line-1"].count("M") == 2
    assert drawn["line-2"].count("M") == drawn["chance"].count("M") == 4
    assert sum(style == "line-1" for style, *_ in marks(chart)) == 3


def test_what_papers_report_are_dots_where_it_can_be_compared():
    reported = ("SAIL", "reported", "reported", (52.4, None, 11.6, None))
    chart = radar_chart(panel(run(1.0, 1.0, 1.0, 1.0), reported, CHANCE))
    assert [style for style, *_ in marks(chart)].count("reported") == 2
    assert "reported" not in lines(chart)
    assert "<title>SAIL, ade top-1 (c): 11.6</title>" in chart


def test_runs_have_shapes_of_their_own_and_text_is_escaped():
    assert len(set(SHAPES.values())) == len(SHAPES) == len({Overview.style(place) for place in range(20)}) + 1
    nasty = "<b>&" + "long " * 9
    chart = radar_chart(panel(run(1.0, 1.0, 1.0, name=nasty), CHANCE, names=(nasty, "b", "c")))
    assert "<b>" not in chart
    assert f"<title>{nasty} top-1 (a)</title>".replace("<b>&", "&lt;b&gt;&amp;") in chart
    shown = re.findall("<tspan[^>]*>([^<]*)<", chart)
    assert max(len(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")) for text in shown) == LETTERS


@pytest.mark.parametrize(
    "little",
    [
        panel(run(1.0, 1.0), CHANCE, names=("a", "b")),
        panel(run(1.0, 1.0, 1.0), CHANCE, names=("a", "b", "c"), task="representation"),
        panel(run(1.0, None, 1.0), run(None, 1.0, 1.0), CHANCE, names=("a", "b", "c")),
    ],
)
def test_no_chart_is_drawn_of_too_little(little):
    assert radar_chart(little) is None


def test_protocols_of_one_set_are_axes_that_can_be_told_apart():
    chart = radar_chart(panel(run(1.0, 1.0, 1.0), CHANCE, names=("ade", "ade", "voc")))
    assert "<title>ade top-1 (a)</title>" in chart
    assert "<title>ade top-1 (b)</title>" in chart


def test_no_chart_is_drawn_of_one_set():
    three = panel(run(1.0, 1.0, 1.0), CHANCE, names=("a", "b", "c"))
    same = [Column("a", column.record, column.metric) for column in three.columns]
    assert radar_chart(Panel(same, three.rows)) is None
    assert radar_chart(three)
