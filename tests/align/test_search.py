"""Search: exact neighbours by texts, pictures, rows and sums of these, against independent computations."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from search_world import COPY, HOSTILE, MISSING, ROWS, make_world
from small_world import SHADES, draw
from typer.testing import CliRunner

from sail_align.align import pretrained
from sail_align.align.cli import app
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.search import index as search_index
from sail_align.align.search import matrix, rows, vectors
from sail_align.align.search.index import SearchIndex, Where
from sail_align.align.search.pictures import Pictures
from sail_align.align.search.query import Term, parse_query
from sail_align.align.search.splits import split_rows
from sail_align.align.train.plan import make_plan
from sail_align.extract.data import UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

TEXTS = ["a red cat", "the dog sleeps on the green bench", "a"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("photos"))


def open_index(world, **options):
    return SearchIndex.open(load_run(world.run), [Store.open(world.store)], manifests=[str(world.manifest)], **options)


@pytest.fixture(scope="module")
def index(photos):
    return open_index(photos)


def keys(found):
    return [hit.facts.key for hit in found.hits]


def text(*words):
    return [Term(word, "text") for word in words]


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("two dogs", [("text", "two dogs", 1)]),
        ("horse + stripes", [("text", "horse", 1), ("text", "stripes", 1)]),
        ("a - b + key:x y.jpg", [("text", "a", 1), ("text", "b", -1), ("key", "x y.jpg", 1)]),
        ("- rain", [("text", "rain", -1)]),
        ("black-and-white  dog", [("text", "black-and-white  dog", 1)]),
        ('"a - b" + "key:x"', [("text", "a - b", 1), ("text", "key:x", 1)]),
        ('key:"a - b.jpg" - c', [("key", "a - b.jpg", 1), ("text", "c", -1)]),
        ('5" pipe + tap', [("text", '5" pipe', 1), ("text", "tap", 1)]),
        ("  ", []),
    ],
)
def test_queries_are_parsed(query, terms):
    assert [(term.kind, term.value, term.sign) for term in parse_query(query)] == terms


@pytest.mark.parametrize(
    "query", ["+", "a +", "a + - b", "+ + a", '""', "key:", "a" * 2_001, " + ".join("a" * 17), "\ud800"]
)
def test_invalid_queries_are_refused(query):
    with pytest.raises(UserError, match="query"):
        parse_query(query)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(0, 12), st.booleans(), st.booleans())
def test_search_is_a_stable_sort_of_exact_scores(seed, rows, count, masked, with_terms):
    """Vectors lie so close together that float16 scores are equal for many of them."""
    random = np.random.default_rng(seed)
    vectors = (random.normal(size=24) + 0.01 * random.normal(size=(rows, 24))).astype(np.float16)
    vectors[rows // 2 :] = vectors[: rows - rows // 2]  # every other vector twice
    terms = random.normal(size=rows).astype(np.float32) * 1e-3 if with_terms else None
    query = random.normal(size=24).astype(np.float32)
    allowed = random.random(rows) < 0.7 if masked else None
    exact = vectors.astype(np.float64) @ query + (0 if terms is None else terms)
    places = np.arange(rows) if allowed is None else np.flatnonzero(allowed)
    expected = places[np.argsort(-exact[places], kind="stable")][:count]
    half = torch.from_numpy(vectors)
    parts = [half[: rows // 3], half[rows // 3 :]] if rows > 2 else [half]
    whole = matrix.Matrix(parts, None if terms is None else torch.from_numpy(terms), unit=False)
    found, scores = whole.search(torch.from_numpy(query), count, allowed)
    np.testing.assert_allclose(scores, exact[expected], rtol=1e-5, atol=1e-5)
    assert (np.diff(exact[found]) <= 1e-5).all()
    same = np.diff(exact[found]) == 0
    assert (np.diff(found)[same] > 0).all()


def test_long_queries_do_not_overflow():
    random = np.random.default_rng(0)
    vectors = (20 * random.normal(size=(50, 300))).astype(np.float16)
    vectors[0] *= 3
    terms = np.zeros(50, np.float32)
    terms[0] = -1e7
    query = vectors[0].astype(np.float32)
    exact = vectors.astype(np.float64) @ query + terms
    whole = matrix.Matrix([torch.from_numpy(vectors)], torch.from_numpy(terms), unit=False)
    assert whole.search(torch.from_numpy(query), 1)[0].tolist() == [exact.argmax()]


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["none", "gaussian"])
def test_scores_are_those_of_the_model(correction, request, tmp_path):
    """Texts by corrected similarity and cosine, pictures by cosine and frozen features: of all rows, in their order."""
    is_plain = correction == "none"
    world = request.getfixturevalue("photos") if is_plain else make_world(tmp_path, correction=correction)
    index, model = open_index(world), pretrained.load(world.run, device="cpu")
    features, _ = Store.open(world.store).image().read()
    picture = draw(99, SHADES["cat"])
    of_images = {corrected: model.heads(image=features, corrected=corrected) for corrected in (False, True)}
    half = torch.from_numpy(features).float()
    frozen = (
        F.normalize(half, dim=1)
        @ F.normalize(model.image_encoder(model.image_encoder.normalise(model.preprocess(picture)[None])), dim=1).T
    )
    cases = [
        (text(TEXTS[0]), None, of_images[True] @ model.encode_text(TEXTS[0], corrected=True).T),
        (text(TEXTS[1]), "aligned", of_images[False] @ model.encode_text(TEXTS[1]).T),
        ([Term(picture, "image")], None, of_images[False] @ model.encode_image(picture).T),
        ([Term(picture, "image")], "frozen", frozen),
    ]
    for terms, space, expected in cases:
        found = index.search(terms, ROWS, space=space, collapse=False)
        scores = np.array([hit.score for hit in found.hits])
        expected = expected[:, 0].detach().numpy()
        rows = [hit.facts.row for hit in found.hits]
        np.testing.assert_allclose(scores, expected[rows], atol=2e-3 * max(1, np.abs(expected).max()))
        assert sorted(rows) == list(range(ROWS))
        assert (np.diff(scores) <= 0).all()


def test_sums_are_sums_of_unit_vectors(photos, index):
    model = pretrained.load(photos.run, device="cpu")
    picture = draw(99, SHADES["dog"])
    terms = [Term(picture, "image"), Term(TEXTS[0], "text"), Term("a", "text", -1)]
    query = model.encode_image(picture) + model.encode_text(TEXTS[0]) - model.encode_text("a")
    expected = (model.heads(image=Store.open(photos.store).image().read()[0]) @ F.normalize(query, dim=1).T)[:, 0]
    found = index.search(terms, ROWS, collapse=False)
    assert found.space == "aligned"
    for hit in found.hits:
        assert hit.score == pytest.approx(float(expected[hit.facts.row]), abs=2e-3)
    with pytest.raises(UserError, match="cancel each other out"):
        index.search([Term("a", "text"), Term("a", "text", -1)])


def test_probabilities_are_those_of_classify(photos, index):
    model, picture = pretrained.load(photos.run, device="cpu"), draw(99, SHADES["dog"])
    expected = model.classify(picture, TEXTS)[0].tolist()
    assert index.probabilities(Term(picture, "image"), TEXTS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("space", ["aligned", "frozen"])
def test_row_finds_its_copy_but_not_itself(index, space):
    found = index.search([Term("002.png", "key")], 30, space=space, collapse=False)
    assert keys(found)[0] == "007.png"
    assert found.hits[0].score == pytest.approx(1, abs=1e-3)
    assert len(found.hits) == found.rows == ROWS - 1


def test_key_of_several_stores_is_refused(photos, tmp_path):
    other = make_world(tmp_path, caption="another")
    stores = [Store.open(photos.store), Store.open(other.store)]
    both = SearchIndex.open(load_run(photos.run), stores, manifests=[str(photos.manifest)])
    assert len(both) == 2 * ROWS
    with pytest.raises(UserError, match=r"Several stores have a row with the key '002\.png': "):
        both.search([Term("002.png", "key")])


def test_near_duplicates_of_better_results_are_left_out(index, monkeypatch):
    monkeypatch.setattr(search_index, "SAME", 0.9999)
    whole = index.search(text("a red cat"), ROWS, collapse=False)
    found = index.search(text("a red cat"), ROWS)
    first = next(key for key in keys(whole) if key in ("002.png", f"{COPY:03d}.png"))
    second = "007.png" if first == "002.png" else "002.png"
    assert keys(found) == [key for key in keys(whole) if key != second]
    assert {hit.facts.key: hit.copies for hit in found.hits if hit.copies} == {first: 1}


def test_filters_choose_rows(index):
    every = index.search(text("a"), ROWS, collapse=False)
    by_key = {hit.facts.key: hit for hit in every.hits}
    assert {hit.label for hit in every.hits} == set(SHADES)
    cases = {
        Where(label="dog"): {key for key, hit in by_key.items() if hit.label == "dog"},
        Where(caption="UNDER the"): {key for key, hit in by_key.items() if "under the" in str(hit.facts.captions)},
        Where(caption="onerror", dataset="photos"): {"003.png"},
        Where(caption=".*"): set(),
    }
    for where, expected in cases.items():
        found = index.search(text("a"), ROWS, where=where, collapse=False)
        assert set(keys(found)) == expected
        assert found.rows == len(expected)
    for where, message in [
        (Where(label="dgo"), "Did you mean 'dog'"),
        (Where(label="7"), "There is no label '7'"),
        (Where(label="9" * 20), "There is no label '999"),
        (Where(dataset="x"), "no data set 'x'"),
        (Where(split="test"), "expected training or held-out"),
        (Where(split="training"), "trained on other stores"),
    ]:
        with pytest.raises(UserError, match=message):
            index.search(text("a"), where=where)


@pytest.mark.parametrize("options", [{}, {"positives": 1}, {"held_out": 0.2}])
def test_splits_are_those_of_the_fit(make_store, options):
    paths = [make_store("a", 150, {"raw": (3, 4), "long": range(40)}, bad=(7,)), make_store("b", 60, first=100)]
    captions = ["raw", "long"] if options.get("positives") else ["raw"]
    plan, _ = make_plan(paths, options, captions=captions)
    stores = [Store.open(path) for path in (*paths, make_store("c", 10, first=500))]
    identities = {"image": plan.pairs[0].image.identity, "text": plan.pairs[0].texts[0].identity}
    run = SimpleNamespace(path=Path("runs/x"), settings=plan.record(), **identities)
    for split, expected in (("training", plan.training), ("held-out", plan.held_out)):
        *found, unused = split_rows(run, stores, split)
        assert all(map(np.array_equal, found, expected))
        assert not unused.any()


def test_vectors_are_computed_once(tmp_path, photos, monkeypatch):
    folder = tmp_path / "vectors"
    first = open_index(photos, folder=folder).search(text("a"), 5)
    monkeypatch.setattr(vectors.StoreVectors, "_features", lambda *_: pytest.fail("embedded again"))
    again = open_index(photos, folder=folder)
    assert not again.shelves[0].vectors.needs_building()
    assert keys(again.search(text("a"), 5)) == keys(first)
    monkeypatch.undo()
    (file,) = folder.glob("*/aligned.npy")
    for damage in (b"", file.read_bytes()[:-2]):
        file.write_bytes(damage)
        assert keys(open_index(photos, folder=folder).search(text("a"), 5)) == keys(first)
    other = load_run(photos.run)
    object.__setattr__(other, "digest", "0" * 64)
    SearchIndex.open(other, [Store.open(photos.store)], folder=folder).build()
    assert len(list(folder.iterdir())) == 2


def test_vectors_stay_in_memory_without_a_folder_to_write(tmp_path, photos):
    (tmp_path / "file").write_text("")
    found = open_index(photos, folder=tmp_path / "file" / "vectors").search(text("a"), 5)
    assert keys(found) == keys(open_index(photos).search(text("a"), 5))


def test_rows_are_read_within_bounds(photos, monkeypatch):
    monkeypatch.setattr(rows, "GROUP_ROWS", 5)
    reader = rows.RowReader(Store.open(photos.store), most_bytes=1)
    assert [reader.facts(row).key for row in (0, 4, 5, ROWS - 1)] == ["000.png", "004.png", "005.png", "023.png"]
    assert reader.find("013.png") == 13
    assert reader.find("x") is None
    assert np.flatnonzero(reader.with_text("ONERROR")).tolist() == [3]
    first = list(SHADES).index(sorted(SHADES)[2])  # labels are numbered in the order of their names
    assert reader.with_label(2).nonzero()[0].tolist() == list(range(first, ROWS, 5))
    assert len(reader._kept) == 1


def test_pictures_are_found_and_nothing_is_fetched(photos, tmp_path, monkeypatch):
    store = Store.open(photos.store)
    folder = photos.manifest.parent
    for pictures in (Pictures(store), Pictures(store, [str(photos.manifest)])):  # beside the store, or named
        assert pictures.problem == ""
        assert pictures.path("000.png") == folder / "images" / "000.png"
        assert pictures.open("000.png").size == (80, 60)
        assert pictures.path("../../../secret.png") is None
        for location in (f"{MISSING:03d}.png", "../../../secret.png", ""):
            with pytest.raises(UnreadableImageError):
                pictures.open(location)
    store.path = tmp_path / "elsewhere.zarr"
    assert "--manifest" in Pictures(store).problem
    assert Pictures(store).classes == ()
    assert Pictures(store, data_root=str(folder)).path("000.png") == folder / "images" / "000.png"
    recorded = store.attributes["manifest"]
    store.attributes["manifest"] = {**recorded, "source": {**recorded["source"], "root": "/etc"}}
    assert "'/etc', which is not opened" in Pictures(store, data_root=str(folder)).problem
    remote = {"kind": "webdataset", "files": "https://example.org/0.tar"}
    store.attributes["manifest"] = {"name": "photos", "source": remote}
    assert "https://example.org/0.tar, which is not opened" in Pictures(store, data_root=str(folder)).problem


def run_search(world, *words):
    return CliRunner().invoke(app, ["search", str(world.run), str(world.store), "--quiet", *words])


def test_command_prints_results(photos, index):
    found = index.search(text("a red cat"), 4)
    done = run_search(photos, "a red cat", "-k", "4")
    assert done.exit_code == 0, done.output
    assert [line.split()[1] for line in done.stdout.splitlines()] == keys(found)
    assert "4 of 24 images by hub-corrected similarity" in done.stderr
    printed = json.loads(run_search(photos, "a red cat", "-k", "4", "--json").stdout)
    assert printed["hits"] == [hit.to_dict() for hit in found.hits]
    assert printed["command"].endswith("search")
    paths = run_search(photos, "-k", "2", "--image", str(photos.manifest.parent / "images" / "002.png"), "--paths")
    assert paths.stdout.splitlines()[0] == str(photos.manifest.parent / "images" / "002.png")
    hostile = run_search(photos, "a", "--caption", "onerror")
    assert HOSTILE[:50] in hostile.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/no", "STORE", "a"], "runs/no is not a run. Train one"),
        (["RUN", "no.zarr", "a"], "no.zarr is not a feature store"),
        (["RUN", "STORE"], "The query is empty. Give a text"),
        (["RUN", "STORE", "  "], "The query is empty"),
        (["RUN", "STORE", "a", "-k", "0"], "--count is invalid: got 0, expected at least 1"),
        (["RUN", "STORE", "a", "-k", "9999"], "got 9999, expected 1 to 1,000"),
        (["RUN", "STORE", "--image", "no.png"], "--image no.png cannot be used: no.png: No such file"),
        (["RUN", "STORE", "key:no.png"], "There is no row with the key 'no.png'"),
        (["RUN", "STORE", "a", "--space", "frozen"], "The frozen image encoder knows no texts"),
        (["RUN", "STORE", "key:002.png", "--space", "corrected"], "Corrected similarities are of texts"),
        (["RUN", "STORE", "a", "--space", "x"], "The space is invalid: got 'x'"),
        (["RUN", "STORE", "a", "--manifest", "no.yaml", "--label", "x"], "no.yaml is missing"),
    ],
)
def test_mistakes_get_one_message(photos, words, message):
    words = [{"RUN": str(photos.run), "STORE": str(photos.store)}.get(word, word) for word in words]
    done = CliRunner().invoke(app, ["search", *words, "--quiet"])
    assert isinstance(done.exception, UserError), done.output
    assert message in str(done.exception)


def test_store_of_another_encoder_is_refused(photos, make_store):
    with pytest.raises(UserError, match=r"has changed|no features of image encoder"):
        SearchIndex.open(load_run(photos.run), [Store.open(make_store("other"))])
    store = Store.open(photos.store)
    with pytest.raises(UserError, match="Give each store once"):
        SearchIndex.open(load_run(photos.run), [store, store])
