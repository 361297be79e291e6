"""A radar chart shows where each score lies, and which are missing."""

import re
from html import unescape

import pytest

from sail_align.evaluate.report.charts import LETTERS, MARKERS, radar_chart
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
    """Return the points of each line by style, as a list of unbroken parts."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: var\(--([\w-]+)\)', chart)
    return {
        style: [[tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", part)] for part in parts]
        for style, parts in ((style, path.split("M")[1:]) for path, style in found)
    }


def marks(chart):
    found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--([\w-]+)\)', chart)
    return [(style, float(x), float(y)) for x, y, style in found]


def texts(chart):
    return [unescape(text) for text in re.findall("<text[^>]*>([^<]*)<", chart)]


def test_each_axis_goes_from_the_centre_to_the_rim():
    chart = radar_chart(panel(run(100.0, 50.0, 0.0, 25.0), CHANCE))
    (top, right, centre, left) = (point for _, *point in marks(chart))
    radius = centre[1] - top[1]
    assert radius > 100
    assert top[0] == pytest.approx(centre[0])
    assert right == pytest.approx([centre[0] + radius / 2, centre[1]], abs=0.01)
    assert left == pytest.approx([centre[0] - radius / 4, centre[1]], abs=0.01)
    assert lines(chart)["chance"][0][0] == pytest.approx((centre[0], centre[1] - radius / 4), abs=0.01)
    assert {"25", "50", "75", "100"} <= set(texts(chart))


def test_a_score_below_chance_lies_inside_chance():
    chart = radar_chart(panel(run(17.5, 1.0, 1.0, 1.0), CHANCE))
    (_, _, ours), *_ = marks(chart)
    assert ours > lines(chart)["chance"][0][0][1]


def test_a_line_has_a_gap_where_its_run_has_no_score():
    chart = radar_chart(panel(run(40.0, None, 40.0, 40.0), run(9.0, 9.0, 9.0, 9.0, place=1), CHANCE))
    drawn = lines(chart)
    assert [len(part) for part in drawn["line-1"]] == [1, 3]
    assert [len(part) for part in drawn["line-2"]] == [len(part) for part in drawn["chance"]] == [5]
    assert sum(style == "line-1" for style, *_ in marks(chart)) == 3


def test_reported_scores_are_dots_on_the_axes_they_have():
    reported = ("SAIL", "reported", "reported", (52.4, None, 11.6, None))
    chart = radar_chart(panel(run(1.0, 1.0, 1.0, 1.0), reported, CHANCE))
    assert [style for style, *_ in marks(chart)].count("reported") == 2
    assert "reported" not in lines(chart)


def test_runs_have_their_own_shapes():
    styles = {Overview.style(place) for place in range(20)}
    assert set(MARKERS) == {*styles, "reported"}
    for shapes in zip(*MARKERS.values(), strict=True):
        assert len(set(shapes)) == len(MARKERS)


def test_names_are_escaped_and_long_ones_are_cut():
    nasty = "<b>&$x$" + "long " * 9
    chart = radar_chart(panel(run(1.0, 1.0, 1.0), CHANCE, names=(nasty, "b", "c")))
    assert "<b>" not in chart
    assert nasty in unescape(re.search('aria-label="([^"]*)"', chart)[1])
    assert f"{nasty[: LETTERS - 1]}…" in texts(chart)


@pytest.mark.parametrize(
    "little",
    [
        panel(run(1.0, 1.0), CHANCE, names=("a", "b")),
        panel(run(1.0, 1.0, 1.0), CHANCE, names=("a", "b", "c"), task="representation"),
        panel(run(1.0, None, 1.0), run(None, 1.0, 1.0), CHANCE, names=("a", "b", "c")),
    ],
)
def test_too_few_scores_have_no_chart(little):
    assert radar_chart(little) is None


def test_protocols_of_one_set_are_axes_of_their_own():
    chart = radar_chart(panel(run(1.0, 1.0, 1.0), CHANCE, names=("ade", "ade", "voc")))
    assert {"top-1 (a)", "top-1 (b)"} <= set(texts(chart))


def test_one_set_has_no_chart():
    three = panel(run(1.0, 1.0, 1.0), CHANCE, names=("a", "b", "c"))
    same = [Column("a", column.record, column.metric) for column in three.columns]
    assert radar_chart(Panel(same, three.rows)) is None
    assert radar_chart(three)
