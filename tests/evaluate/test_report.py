"""The report is one page that needs nothing else, and says everything in text too."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sail_align.align.stats.overlay import PALETTE, REST
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import html as html_of
from sail_align.evaluate.report.page import write_report
from sail_align.evaluate.results.scores import RunScores
from sail_align.extract.errors import UserError


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
def page(scored):
    return Page(write_report(scored).read_text())


@pytest.mark.slow
def test_page_is_self_contained(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes[name][:80])
    assert not page.all("script")
    assert not page.all("link")


@pytest.mark.slow
def test_pictures_are_valid_and_have_alt_text(page):
    pictures = page.all("img")
    assert len(pictures) == 3 + 3 * 3 + 2 + 4
    for picture in pictures:
        assert picture["alt"]
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2])))
        assert image.size == (int(picture["width"]), int(picture["height"]))


@pytest.mark.slow
def test_table_has_chance_and_interval_of_every_metric(page, run):
    text = " ".join(" ".join(page.text).split())
    for record in json.loads((run.path / "scores.json").read_bytes())["records"]:
        assert f"n = {record['items']}" in text
        for metric in record["metrics"]:
            low, high = metric["interval"]
            assert re.search(rf"{re.escape(metric['label'])} \S+ {metric['value']:.1f} {low:.1f} – {high:.1f}", text)


@pytest.mark.slow
def test_header_describes_the_run(page):
    text = " ".join(" ".join(page.text).split())
    for fact in (
        "colour-image",
        "linear, 3 dimensions",
        "1,234 pairs, 56 held out",
        "lion at 1e-05",
        "colours.zarr cccc",
    ):
        assert fact in text


@pytest.mark.slow
def test_headings_and_tables_are_accessible(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) > 3
    assert all("scope" in attributes for attributes in page.all("th"))
    assert dict(page.tags)["html"]["lang"] == "en"


@pytest.mark.slow
def test_keyboard_reaches_all_content(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert links[0] == "#main"
    assert {link.removeprefix("#") for link in links} <= ids
    for attributes in page.all("div"):
        if "scroll" in attributes.get("class", "").split() and "role" in attributes:
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


@pytest.mark.slow
def test_confusions_are_listed(page):
    assert "blue red 1 of 1" in " ".join(" ".join(page.text).split())


@pytest.mark.slow
def test_scores_by_kind_are_a_table(scored):
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    (pairs,) = (record for record in scores["records"] if record["task"] == "winoground")
    pairs["details"]["by_tag"] = {
        "object & relation": {"items": 1, "text": [50.0, 25.0, 75.0], "group": [0.0, 0.0, 0.0]}
    }
    (scored / "scores.json").write_text(json.dumps(scores))
    text = " ".join(" ".join(Page(write_report(scored).read_text()).text).split())
    assert "kind pairs text group object & relation 1 50.0 25.0 – 75.0 0.0 0.0 – 0.0" in text


@pytest.mark.slow
def test_run_with_scores_only_has_a_report(scored):
    """No curves, no examples, no interval, a set that failed."""
    shutil.rmtree(scored / "examples")
    (scored / "metrics.jsonl").unlink()
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    del scores["records"][0]["metrics"][0]["interval"]
    scores["records"].append({"dataset": "gone", "title": "G", "task": "mmvp", "error": "<i>no file</i>"})
    (scored / "scores.json").write_text(json.dumps(scores))
    page = Page(write_report(scored).read_text())
    text = " ".join(" ".join(page.text).split())
    assert not page.all("img")
    assert "top-1 33.3 66.7 – " in text
    assert "gone (mmvp) was not scored with colours-linear: <i>no file</i>" in text


@pytest.mark.slow
def test_run_without_scores_has_a_report(scored):
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    scores["records"] = [{"dataset": "gone", "title": "G", "task": "mmvp", "error": "no file"}]
    (scored / "scores.json").write_text(json.dumps(scores))
    page = Page(write_report(scored).read_text())
    assert "No set has been scored." in "".join(page.text)
    assert "gone (mmvp) was not scored with colours-linear: no file" in "".join(page.text)


@pytest.mark.slow
def test_folder_without_settings_is_rejected(scored):
    (scored / "settings.json").unlink()
    with pytest.raises(UserError, match=r"settings\.json cannot be read"):
        write_report(scored)


@pytest.mark.slow
def test_cards_and_sets_have_unique_titles(scored):
    """A retrieval set is scored as two tasks, and any set under several protocols."""
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    (retrieval,) = (record for record in scores["records"] if record["task"] == "retrieval")
    aligned = [{**retrieval["metrics"][0], "name": name} for name in ("knn_aligned", "cka_aligned")]
    representation = {"task": "representation", "protocol": "representation/first-caption@1/caps", "metrics": aligned}
    scores["records"] += [retrieval | representation, retrieval | {"protocol": "retrieval/other@1/caps"}]
    (scored / "scores.json").write_text(json.dumps(scores))
    html = write_report(scored).read_text()
    cards = re.findall('<section class="card"><h3>(.*?)</h3>', html, re.DOTALL)
    sets = re.findall('<tr class="set"><th.*?>(.*?)<small><code>', html, re.DOTALL)
    cards = [heading for heading in cards if "<small>" in heading]  # charts have cards too
    assert len(cards) == len(set(cards)) == len(sets) == len(set(sets)) == 6
    assert sum("(b) retrieval" in heading for heading in cards) == 1
    assert sum("(e) representation" in heading for heading in cards) == 1


@pytest.mark.slow
def test_examples_are_grouped_by_set_then_run(scored):
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    (retrieval,) = (record for record in scores["records"] if record["task"] == "retrieval")
    scores["records"].append(retrieval | {"protocol": "retrieval/other@1/caps"})
    (scored / "scores.json").write_text(json.dumps(scores))
    (examples,) = scored.glob("examples/caps-retrieval-*.json")
    shutil.copy(examples, RunScores.read(scored).records[-1].file(scored, "examples"))
    shutil.copytree(scored, scored.with_name("other"))
    html = html_of(Overview(RunScores.read_all([scored, scored.with_name("other")])))
    headings = re.findall(r"<h3>caps <small>\((\w)\) <span.*?</span>(.*?)</small>", html)
    assert headings == [("b", "colours-linear"), ("b", "other"), ("e", "colours-linear"), ("e", "other")]


@pytest.mark.slow
def test_incomplete_set_is_marked_beside_its_scores(scored):
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    scores["records"][0]["data"]["expected_rows"] = 50_000
    (scored / "scores.json").write_text(json.dumps(scores))
    text = " ".join(" ".join(Page(write_report(scored).read_text()).text).split())
    assert text.count("squares (a) classification, not the published set") == 2
    assert text.count("not the published set") == 2


COLOURS = re.compile(r"--([\w-]+): (#[0-9a-f]{6});")


def contrast(first, second):
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    brighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag_aa(scheme):
    """4.5 for text, 3 for what is drawn: the levels of WCAG's AA."""
    sheet = (resources.files("sail_align.align.stats") / "page_base.css").read_text()
    light, dark = sheet.split("@media (prefers-color-scheme: dark)", 1)
    colours = dict(COLOURS.findall(light if scheme == "light" else dark.split("}", 1)[0]))
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert set(colours) == set(dict(COLOURS.findall(light)))
    for behind in ("page", "card"):
        for text in ("ink", "soft", "right", "wrong"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
        for drawn in ("chance", "focus", "reported", *(f"line-{number}" for number in range(1, 7))):
            assert contrast(colours[drawn], colours[behind]) >= 3, (drawn, behind)


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009
CONES = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("cones", CONES)
def test_class_colours_differ_for_colour_blind_readers(cones):
    """In CIELAB 2.3 is a difference that can just be seen."""

    def lab(colour):
        values = np.array(colour) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(CONES[cones]) @ linear, 0, 1)
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        x, y, z = np.cbrt(to_xyz @ seen / (0.9505, 1, 1.089))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    assert min(np.linalg.norm(lab(one) - lab(other)) for one, other in combinations([*PALETTE, REST], 2)) > 20
    assert min(np.linalg.norm(lab(one) - lab(other)) for one, other in combinations(PALETTE[:6], 2)) > 35


@pytest.mark.slow
def test_curves_are_drawn_from_the_metrics_file(page):
    charts = [attributes["aria-label"] for attributes in page.all("svg") if "aria-label" in attributes]
    assert charts[0].startswith("Radar chart, from 0 to 100, of squares top-1 (a), caps image→text R@1 (b),")
    assert charts[1:] == ["loss over step", "R@1 (%) over step"]


@pytest.mark.slow
def test_captions_are_escaped(page):
    assert "red <b>&" in "".join(page.text)
    assert not page.all("b")


@pytest.mark.slow
def test_run_without_curves_has_a_report(page, run):
    (run.path / "metrics.jsonl").unlink()
    assert "loss over step" not in write_report(run.path).read_text()


@pytest.mark.slow
def test_truncated_last_log_line_is_ignored(page, run):
    whole = write_report(run.path).read_bytes()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert write_report(run.path).read_bytes() == whole


@pytest.mark.slow
def test_page_is_small(page, run):
    assert Path(run.path / "report.html").stat().st_size < 200_000
