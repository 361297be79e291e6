"""The report in a browser: nothing fails to load, nothing is complained of, and what should be there is there."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from itertools import chain

import pytest

from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import html, write_report
from sail_align.evaluate.results.scores import RunScores

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on PATH")

POLICY = "default-src 'none';"
PROBE = """<script>
const problems = [];
const said = what => problems.push(what);
addEventListener("error", event => said(event.message || `cannot load ${event.target.src || event.target.href}`), true);
addEventListener("securitypolicyviolation", event => said(`may not load ${event.blockedURI}`));
addEventListener("load", () => {
  const shown = document.querySelector("iframe")?.contentWindow ?? window;
  const found = {
    problems,
    pictures: [...document.images].map(each => each.naturalWidth),
    tables: [...document.querySelectorAll("table")].map(each => [each.caption.innerText, each.rows.length]),
    charts: [...document.querySelectorAll("svg")].map(each => each.getBoundingClientRect().height),
    width: [shown.document.documentElement.scrollWidth, shown.innerWidth],
    background: getComputedStyle(shown.document.body).backgroundColor,
  };
  const written = document.createElement("pre");
  written.id = "found";
  written.textContent = JSON.stringify(found);
  document.body.append(written);
});
</script>"""


@pytest.fixture
def opened(tmp_path):
    """Open a page, return what a probe in it found, and all that the console says."""

    def open_page(html, *options):
        assert html.count("<head>") == 1
        probed = html.replace("<head>", f"<head>{PROBE}").replace(POLICY, f"{POLICY} script-src 'unsafe-inline';")
        (tmp_path / "page.html").write_text(probed)
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=5000", "--enable-logging=stderr", "--window-size=1280,900", *options]
        command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
        for last in (False, True):  # on a busy machine a browser has been seen to hang before it reads anything
            try:
                ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
                break
            except subprocess.TimeoutExpired:
                if last:
                    raise
        found = json.loads(unescape(re.search('<pre id="found">(.*?)</pre>', ended.stdout, re.DOTALL)[1]))
        return found, [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]

    return open_page


@pytest.fixture
def two(scored):
    """The page of a run and another with the same scores, next to a set of the first's that failed."""
    other = scored.with_name("other & co")
    shutil.copytree(scored, other)
    scores = json.loads((scored / "scores.json").read_bytes())
    scores.pop("digest")
    scores["records"].append({"dataset": "broken", "title": "B", "task": "mmvp", "error": "<b>no such file</b>"})
    (scored / "scores.json").write_text(json.dumps(scores))
    return html(Overview(RunScores.read_all([scored, other])))


def test_page_opens_without_errors(scored, opened):
    found, console = opened(write_report(scored).read_text())
    assert (found["problems"], console) == ([], [])
    assert len(found["pictures"]) == 3 + 3 * 3 + 2 + 4
    assert all(width > 0 for width in found["pictures"])
    rows = dict(found["tables"])
    assert rows["Every metric, per cent or ranks from 1, with its 95 % interval over images or pairs"] == 1 + 4 + 18
    assert rows["Most frequent confusions"] == 2
    assert found["charts"]


def test_two_runs_side_by_side_open_without_errors(two, opened):
    found, console = opened(two)
    assert (found["problems"], console) == ([], [])
    assert len(found["pictures"]) == 2 * (3 + 3 * 3 + 2 + 4)
    assert all(width > 0 for width in found["pictures"])
    assert "Models side by side. Per cent; ± is half of the 95 % bootstrap interval." in dict(found["tables"])


def in_frame(html):
    """A window has 500 pixels at the least."""
    return f'<html><head></head><iframe width="400" height="900" srcdoc="{escape(html)}"></iframe></html>'


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_window_does_not_scroll_sideways(two, opened, scheme):
    found, console = opened(in_frame(two), f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}")
    assert (found["problems"], console) == ([], [])
    wide, shown = found["width"]
    assert wide <= shown == 400
    channels = [int(value) for value in re.findall(r"\d+", found["background"])]
    assert (sum(channels) > 3 * 128) == (scheme == "light")


def test_probe_detects_wide_content(opened):
    found, _ = opened(in_frame('<div style="width: 450px">x</div>'))
    assert found["width"][0] > 400


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ('<img src="https://example.org/a.png" alt="a">', "may not load https://example.org/a.png"),
        ('<img src="data:image/png;base64,AAAA" alt="a">', "cannot load data:image/png;base64,AAAA"),
        ("<script>nothing.here</script>", "Uncaught ReferenceError: nothing is not defined"),
        ("<script>console.error('mind this')</script>", "mind this"),
    ],
)
def test_probe_detects_faults(opened, fault, complaint):
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY} img-src data:">'
    found, console = opened(f"<html><head>{policy}</head>{fault}</html>")
    assert any(complaint in said for said in chain(found["problems"], console))
