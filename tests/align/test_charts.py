"""Charts show the numbers given to them, in the same bytes each time."""

import re
from xml.etree import ElementTree

import pytest

from sail_align.align.stats.charts import COLOURS, dot_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"
LOSS = {"training": [(0, 8.0), (10, 2.0), (20, 0.5)], "held <out>": [(0, 8.5), (20, 0.25)]}


def texts(svg):
    return {text.text: text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def drawn_points(svg, colour):
    """Return the points of the first line of a colour."""
    styles = ((path.get("d"), path.get("style", "")) for path in ElementTree.fromstring(svg).iter(f"{SVG}path"))
    line = next(data for data, style in styles if f"fill: none; stroke: {colour}" in style)
    return [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]


def test_line_chart_places_points_on_its_axes():
    svg = line_chart(LOSS, "step", "loss")
    labels = texts(svg)
    assert {"training", "held <out>", "step", "loss", "0", "20", "8"} <= labels.keys()
    points = drawn_points(svg, COLOURS["line-1"])
    assert [x for x, _ in points[1:]] == pytest.approx([float(labels[tick].get("x")) for tick in ("10", "20")])
    assert points[0][1] == pytest.approx(float(labels["8"].get("y")), abs=6)  # a text's y is its baseline


@pytest.mark.slow
def test_line_chart_is_logarithmic_only_if_allowed_and_wide():
    narrow = {"training": [(0, 2.0), (10, 1.0)]}
    assert "loss (log scale)" in texts(line_chart(LOSS, "step", "loss", allow_log=True))
    assert "loss" in texts(line_chart(LOSS, "step", "loss"))
    assert "loss" in texts(line_chart(narrow, "step", "loss", allow_log=True))


def test_dot_chart_places_dots_and_whiskers():
    svg = dot_chart(["one", "<two>"], {"a & b": [(0, 0), (10, 1)], "c": [(5, 0), (5, 0)]}, "R@1")
    labels = texts(svg)
    assert {"a & b", "one", "<two>", "R@1", "0", "10"} <= labels.keys()
    zero, ten = (float(labels[tick].get("x")) for tick in ("0", "10"))
    whiskers = re.findall(rf'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \n"[^>]*stroke: {COLOURS["line-1"]}', svg)
    left, right = map(float, whiskers[-2])  # the last is in the legend
    assert [left, right] == pytest.approx([zero + 0.9 * (ten - zero), zero + 1.1 * (ten - zero)])


@pytest.mark.slow
def test_same_chart_has_same_bytes():
    assert line_chart(LOSS, "step", "loss") == line_chart(LOSS, "step", "loss")
    assert "20" not in re.findall(r"<dc:date>(.*)</dc:date>", line_chart(LOSS, "step", "loss"))


def test_inline_chart_takes_size_and_colours_from_the_page():
    svg = line_chart(LOSS, "step <x>", "loss", inline=True)
    root = ElementTree.fromstring(svg)
    assert (root.get("class"), root.get("aria-label")) == ("chart", "loss over step <x>")
    assert root.get("width") is None
    assert "var(--line-1)" in svg
    assert not re.findall("#[0-9a-f]{6}", svg)
    assert "<style" not in svg
    referenced = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    assert {found.get("id") for found in root.iter() if found.get("id")} == referenced


def test_long_curve_is_averaged():
    assert len(line_chart({"loss": [(step, 1.0) for step in range(100_000)]}, "step", "loss")) < 40_000
