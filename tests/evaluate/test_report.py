"""The report is one page that needs nothing else, and says everything in text too."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sail_align.align.charts import Series, line_chart, log_ticks, ticks
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report import write_report
from sail_align.extract.manifest import find_manifest


class Page(HTMLParser):
    """Collects tags with their attributes, and the text; checks that tags nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "link", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(world, run):
    manifests = [
        world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"}),
        world.squares("caps", [("red", "red <b>&"), ("green", "green"), ("blue", "blue")], {"kind": "retrieval"}),
        world.squares("pairs", [("red", "red"), ("green", "green")], {"kind": "winoground"}),
        world.halves("halves", [("red", "green")], {"kind": "segmentation"}),
    ]
    steps = [{"kind": "train", "step": step, "loss": 5 / (1 + step)} for step in range(10)]
    heldout = [{"kind": "heldout", "step": step, "loss": 1.0, "t2i_r1": 9.0 * step, "i2t_r1": 8.0} for step in (0, 9)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + heldout))
    sets = [find_manifest(str(path)) for path in manifests]
    for record in evaluate_sets(run, sets, features=world.folder / "features", quiet=True):
        assert "error" not in record
    return Page(write_report(run.path).read_text())


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes[name][:80])
    assert not page.all("script")
    assert not page.all("link")


def test_every_picture_is_whole_and_has_an_alternative_text(page):
    pictures = page.all("img")
    assert len(pictures) == 2 + 3 * 3 + 2 + 4
    for picture in pictures:
        assert picture["alt"]
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2])))
        assert image.size == (int(picture["width"]), int(picture["height"]))


def test_the_table_has_chance_and_interval_of_every_metric(page, run):
    text = " ".join(" ".join(page.text).split())
    for record in json.loads((run.path / "scores.json").read_bytes())["records"]:
        assert f"n = {record['items']}" in text
        for metric in record["metrics"]:
            low, high = metric["interval"]
            assert re.search(rf"{re.escape(metric['label'])} {metric['value']:.1f} .* {low:.1f} – {high:.1f}", text)


def test_the_head_of_the_page_says_what_was_trained_on_what(page):
    text = " ".join(" ".join(page.text).split())
    for fact in (
        "colour-image",
        "linear, 3 dimensions",
        "1,234 pairs, 56 held out",
        "lion at 1e-05",
        "colours.zarr cccc",
    ):
        assert fact in text


def test_curves_are_drawn_from_the_metrics_file(page):
    charts = [attributes["aria-label"] for attributes in page.all("svg") if "aria-label" in attributes]
    assert charts == ["loss over step", "R@1 (%) over step"]
    assert len(page.all("polyline")) == 4


def test_captions_are_shown_as_text_and_not_as_markup(page):
    assert "red <b>&" in "".join(page.text)
    assert not page.all("b")


def test_a_run_without_curves_has_a_report(page, run):
    (run.path / "metrics.jsonl").unlink()
    assert not Page(write_report(run.path).read_text()).all("polyline")


def test_a_last_line_that_a_kill_cut_is_left_out(page, run):
    whole = write_report(run.path).read_bytes()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert write_report(run.path).read_bytes() == whole


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 87), (3, 3), (-2.5, 0.1), (0, 12345), (0, 0)])
def test_ticks_are_few_and_span_the_values(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 8
    assert values[0] <= low
    assert values[-1] >= high


def test_log_ticks_are_powers_of_ten_around_the_values():
    assert log_ticks(0.02, 7) == [0.01, 0.1, 1.0, 10.0]


def test_a_long_curve_is_thinned():
    drawn = line_chart([Series("loss", [(step, 1.0) for step in range(100_000)], "line-1")], "step", "loss")
    assert len(drawn) < 20_000


def test_the_page_is_small(page, run):
    assert Path(run.path / "report.html").stat().st_size < 200_000
