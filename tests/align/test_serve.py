"""The search page over HTTP: the same answers as the index, bounds, refusals and escaping."""

import hashlib
import re
import socket
import sys
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from urllib.parse import parse_qs, urlencode

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import serving
from PIL import Image
from search_world import HOSTILE, MISSING, make_world
from small_world import SHADES, draw, save_run
from typer.testing import CliRunner

from sail_align.align import pretrained
from sail_align.align.cli import app
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.search.index import SearchIndex
from sail_align.align.search.query import Term, parse_query
from sail_align.align.serve import app as serve_app
from sail_align.align.serve.asked import Asked
from sail_align.align.serve.pictures import Kept
from sail_align.align.stats.overlay import PALETTE, overlay
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

pytestmark = pytest.mark.slow


def png(image):
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


class Elements(HTMLParser):
    """Lists the elements of a page with their attributes."""

    def __init__(self):
        super().__init__()
        self.all = []

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def index(world):
    return SearchIndex.open(load_run(world.run), [Store.open(world.store)])


@pytest.fixture(scope="module")
def live(index):
    with serving([index]) as running:
        yield running


def snapshot(world):
    files = [path for path in world.folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def page_keys(content):
    return re.findall(r'class="hit" data-key="([^"]*)"', content.decode())


def test_page_and_json_are_the_results_of_the_index(live, index):
    for asked in ("a red cat", "a red cat - the dog", "key:002.png", "key:002.png + a dog"):
        expected = [hit.facts.key for hit in index.search(parse_query(asked), 24).hits]
        path = f"/?{urlencode({'q': asked})}"
        page = live.ask(path, accept="text/html,*/*")
        assert page.status == 200
        assert page_keys(page.content) == expected
        for found in (live.json(path), live.json(f"{path}&format=json")):
            (run,) = found["runs"]
            assert [hit["key"] for hit in run["hits"]] == expected
            assert not {"path", "image"} & run["hits"][0].keys()
            assert live.ask(run["hits"][0]["thumbnail"]).getheader("content-type") == "image/jpeg"


def test_filters_and_spaces_of_the_url_count(live, index):
    found = live.json("/?q=key:002.png&space=frozen&label=green&count=3&duplicates=1")["runs"][0]
    assert (found["space"], found["rows"], len(found["hits"])) == ("frozen", 5, 3)
    assert {hit["label"] for hit in found["hits"]} == {"green"}
    found = live.json("/?q=a&caption=onerror&dataset=photos")["runs"][0]
    assert [hit["key"] for hit in found["hits"]] == ["003.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/?q=key:no", "no row with the key 'no'"),
        ("/?q=a+%2B", "a term is empty"),
        ("/?q=a&space=frozen", "knows no texts"),
        ("/?q=a&count=x", "count is invalid: got 'x'"),
        ("/?q=a&count=0", "got 0, expected 1"),
        ("/?q=a&count=99999", "expected 1 to 1,000"),
        ("/?q=a&split=held-out", "are unknown"),
        ("/?q=a&label=%3Cb%3E", "no label '<b>'"),
        (f"/?q={'a' * 2_001}", "2,001 characters"),
        ("/?picture=0123", "no longer here"),
        (f"/?q=key:002.png&labels={','.join(map(str, range(65)))}", "65 labels"),
    ],
)
def test_mistakes_are_named(live, path, message):
    answer = live.json(path)
    assert message in (answer.get("error") or answer["runs"][0]["error"])
    page = live.ask(path)
    assert page.status == 400
    assert b'role="alert"' in page.content
    assert b"<b>" not in page.content.replace(b"<b>0", b"")


def test_text_of_others_is_escaped_and_the_policy_is_strict(live):
    page = live.ask(f"/?{urlencode({'q': HOSTILE, 'caption': 'onerror', 'label': ''})}")
    text = page.content.decode()
    assert page_keys(page.content) == ["003.png"]
    assert HOSTILE[:30] in unescape(text)
    elements = Elements()
    elements.feed(text)
    assert [found for found in elements.all if found[0] in ("script", "style")] == [
        ("script", {"src": "/page.js", "defer": None})
    ]
    names = {name for _, attributes in elements.all for name in attributes}
    assert not [name for name in names if name.startswith("on") or name == "style"]
    links = [attributes.get(name) for _, attributes in elements.all for name in ("href", "src", "action")]
    assert all(link.startswith(("/", "#", "data:,")) for link in links if link is not None)
    policy = page.getheader("content-security-policy")
    assert policy.startswith("default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'")
    assert "unsafe" not in policy
    assert page.getheader("x-content-type-options") == "nosniff"


def test_pictures_are_small_and_missing_ones_have_a_placeholder(live):
    answer = live.ask("/rows/0/0?side=256")
    assert Image.open(BytesIO(answer.content)).size == (80, 60)
    missing = live.ask(f"/rows/0/{MISSING}?side=256")
    assert (missing.status, missing.getheader("content-type").split(";")[0]) == (200, "image/svg+xml")
    for path in ("/rows/0/999?side=256", "/rows/7/0", "/rows/0/0?side=9999", "/rows/0/-1", "/x", "/../app.py"):
        assert live.ask(path).status == 404


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
def test_kept_bytes_are_bounded(puts):
    kept = Kept(20)
    for key, size in puts:
        kept.put(key, b"x" * size)
        assert kept._bytes == sum(map(len, kept._values.values())) <= 20
        assert kept.get(key) == b"x" * size


def test_given_picture_is_searched(live, index, monkeypatch):
    picture = draw(99, SHADES["dog"])
    name = live.json("/pictures", method="POST", body=png(picture))["picture"]
    expected = [hit.facts.key for hit in index.search([Term(picture, "image")], 24).hits]
    assert [hit["key"] for hit in live.json(f"/?picture={name}")["runs"][0]["hits"]] == expected
    both = index.search([*parse_query("a red cat"), Term(picture, "image")], 24).hits
    assert [hit["key"] for hit in live.json(f"/?picture={name}&q=a+red+cat")["runs"][0]["hits"]] == [
        hit.facts.key for hit in both
    ]
    assert live.ask(f"/pictures/{name}").getheader("content-type") == "image/jpeg"
    assert "cannot be used" in live.json("/pictures", method="POST", body=b"<svg/>")["error"]
    monkeypatch.setattr("sail_align.align.serve.pictures.MOST_UPLOADED", 10)
    monkeypatch.setattr(serve_app, "MOST_UPLOADED", 10)
    assert "more than 10 bytes" in live.json("/pictures", method="POST", body=b"x" * 1_000_000)["error"]


def test_labels_give_probabilities_and_an_overlay(live, world):
    labels = ["a red cat", "the dog", "a bench"]
    model = pretrained.load(world.run, device="cpu")
    picture = draw(2, SHADES["cat"])
    given = {"q": "key:002.png", "labels": ", ".join(labels)}
    found = live.json(f"/?{urlencode(given)}")["runs"][0]["labels"]
    expected = dict(zip(labels, model.classify(picture, labels)[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=2e-3)
    assert list(found) == sorted(found, key=lambda label: -found[label])
    answer = live.ask(f"/overlay?{urlencode(given)}")
    tinted = overlay(picture, model.segment(picture, labels).labels, dict(enumerate(PALETTE)))
    assert np.array_equal(np.array(Image.open(BytesIO(answer.content))), np.array(tinted))
    assert live.ask("/overlay?q=a&labels=b").status == 400
    missing = live.ask(f"/overlay?q=key:{MISSING:03d}.png&labels=b")
    assert (missing.status, b"cannot be opened" in missing.content) == (400, True)


def test_requests_of_other_sites_are_refused(live):
    assert live.ask("/", host=f"evil.example:{live.port}").status == 421
    assert live.ask("/", host="[").status == 421
    assert live.ask("/", host=f"localhost:{live.port}").status == 200
    refused = live.ask("/pictures", method="POST", body=b"x", origin="http://evil.example")
    assert refused.status == 403
    assert live.ask("/", method="POST", body=b"x").status == 405


def test_other_machines_need_the_token(index):
    with serving([index], token="secret") as live:
        for headers in ({}, {"cookie": "sail-token=x"}, {"authorization": "Bearer x"}, {"cookie": "\x01;;="}):
            refused = live.ask("/?q=a&token=x", **headers)
            assert refused.status == 401
            assert refused.getheader("content-security-policy")
        assert live.ask("/rows/0/0").status == 401
        moved = live.ask("/?q=a+b&token=secret&format=json")
        assert (moved.status, moved.getheader("location")) == (303, "/?q=a+b&format=json")
        cookie = moved.getheader("set-cookie")
        assert {"HttpOnly", "SameSite=lax"} <= set(cookie.split("; "))
        assert live.ask("/?q=a", cookie=cookie.split(";")[0], host="my.machine").status == 200
        assert live.ask("/?q=a", authorization="Bearer secret").status == 200
        assert live.ask("//evil.example/?token=secret").getheader("location").startswith("/evil.example/")


def test_progress_is_shown_until_everything_is_embedded(world, tmp_path):
    index = SearchIndex.open(load_run(world.run), [Store.open(world.store)], folder=tmp_path)
    with serving([index], prepare=False) as live:
        waiting = live.ask("/?q=a", accept="application/json")
        assert (waiting.status, waiting.getheader("retry-after")) == (503, "1")
        assert b'<progress id="progress" max="24" value="0"' in live.ask("/?q=a").content
        assert live.json("/progress") == {"done": 0, "total": 24, "ready": False, "error": ""}
        live.server.preparation.start()
        live.server.preparation.wait()
        assert live.json("/progress") == {"done": 24, "total": 24, "ready": True, "error": ""}
        assert live.ask("/?q=a").status == 200


def test_failed_preparation_is_shown(world, tmp_path, monkeypatch):
    index = SearchIndex.open(load_run(world.run), [Store.open(world.store)], folder=tmp_path)
    monkeypatch.setattr(index, "build", lambda *_, **__: (_ for _ in ()).throw(UserError("It has diverged.")))
    with serving([index]) as live:
        assert live.json("/?q=a") == {"error": "It has diverged."}


def test_two_runs_are_shown_side_by_side(world, index):
    other = load_run(save_run(world.folder / "runs" / "other", index.run.image, index.run.text, seed=1))
    with serving([index, SearchIndex.open(other, [Store.open(world.store)])]) as live:
        first, second = live.json("/?q=a+red+cat&space=aligned")["runs"]
        assert (first["run"], second["run"]) == ("photos", "other")
        assert [hit["key"] for hit in first["hits"]] != [hit["key"] for hit in second["hits"]]
        page = live.ask("/?q=a+red+cat&space=aligned").content
        assert page_keys(page) == [hit["key"] for run in (first, second) for hit in run["hits"]]
        one_lacks_it = live.json("/?q=a&space=corrected")["runs"]
        assert "no hub correction" in one_lacks_it[1]["error"]
        assert one_lacks_it[0]["hits"]


def test_nothing_on_disk_changes(live, world):
    before = snapshot(world)
    name = live.json("/pictures", method="POST", body=png(draw(1, SHADES["red"])))["picture"]
    for path in ("/?q=a", f"/?picture={name}", "/rows/0/1", "/?q=key:001.png&labels=a,b"):
        assert live.ask(path).status == 200
    assert snapshot(world) == before


@given(st.text(max_size=20), st.sampled_from(["", "aligned"]), st.integers(1, 999), st.text(max_size=9))
def test_urls_say_what_was_asked(q, space, count, key):
    asked = Asked(q=q.strip(), space=space, count=count, labels="a, b", picture=("ab", "cd"))
    assert Asked.parse(parse_qs(asked.url().partition("?")[2], errors="surrogatepass")) == asked


@pytest.mark.parametrize("key", ["a.jpg", "a b.jpg", "a - b.jpg", " a", "x + y", '5"'])
def test_links_of_a_row_find_it(key):
    asked = Asked(q="dog", labels="a", space="corrected")
    similar = Asked.parse(parse_qs(asked.similar(key).partition("?")[2]))
    assert [(term.kind, term.value) for term in parse_query(similar.q)] == [("key", key)]
    added = Asked.parse(parse_qs(asked.with_row(key, "-").partition("?")[2]))
    assert [(term.value, term.sign) for term in parse_query(added.q)] == [("dog", 1), (key, -1)]
    assert (added.labels, added.space) == ("", "")


def test_command_refuses_what_cannot_be_served(world, monkeypatch):
    words = ["serve", str(world.run), str(world.store)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = CliRunner().invoke(app, [*words, "--port", str(taken.getsockname()[1])])
        assert "cannot be listened on (Address already in use). Pass another --port" in str(refused.exception)
    assert "runs/no is not a run" in str(CliRunner().invoke(app, ["serve", "runs/no", str(world.store)]).exception)
    assert "no.zarr is not a feature" in str(CliRunner().invoke(app, ["serve", str(world.run), "no.zarr"]).exception)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'sail-align[serve]'" in str(CliRunner().invoke(app, words).exception)
