"""Captions joined by URL or key, compared with a join by a dictionary in memory."""

import csv
import json
import os
import signal
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interrupted import Killed, contents, open_and_die, open_pictures, shrink
from tars import img2dataset_members, write_tar
from typer.testing import CliRunner

from sail_align.extract.check import _check_captions, check
from sail_align.extract.cli import app
from sail_align.extract.data import CaptionTables, Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest
from sail_align.extract.sources import table_files
from sail_align.extract.store import index, recaptions
from sail_align.extract.store.recaptions import RecaptionReport
from sail_align.extract.store.store import Store


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """Index files of 32 rows, tables in batches of 5, a spill every few batches."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        patch.setattr(recaptions, "SPILL_BYTES", 500)
        patch.setattr(table_files, "BATCH_ROWS", 5)
        yield


def write_table(path: Path, rows, header=("Image Path", "longSV_captions", "shortSV_captions")) -> Path:
    if path.suffix == ".parquet":
        columns = [[row[i] for row in rows] for i in range(len(header))]
        pq.write_table(
            pa.table({name: pa.array(c, pa.string()) for name, c in zip(header, columns, strict=True)}), path
        )
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    return path


CAPTIONS = {"long": "longSV_captions", "short": "shortSV_captions"}


def join(folder: Path, samples, files, field="url") -> Store:
    joined = CaptionTables(tuple(files), field, "Image Path", CAPTIONS)
    return Store.create(
        folder / "s.zarr",
        dataset="set",
        manifest={},
        parts=[Part.of(samples)],
        captions=["raw"],
        recaptions=joined,
        quiet=True,
    )


def expected(names, rows):
    """An independent implementation: the captions of each row of `names`, and the number of caption rows by outcome."""
    captions, outcomes = {}, {"joined": 0, "no_image": 0, "duplicates": 0, "empty": 0}
    for name, *texts in rows:
        kept = {kind: text for kind, text in zip(CAPTIONS, texts, strict=True) if text and text.strip()}
        if not name or not kept:
            outcomes["empty"] += 1
        elif name not in names:
            outcomes["no_image"] += 1
        elif name in captions:
            outcomes["duplicates"] += 1
        else:
            captions[name] = kept
            outcomes["joined"] += 1
    return [captions.get(name, {}) for name in names], outcomes


# Of two letters: no two of these collide both by the first and by the last, as 'c' and 'cc' would.
NAMES = st.just("") | st.text(string.ascii_letters[:6], min_size=2, max_size=2)
WORDS = st.sampled_from(["", " ", "a", "some words", 'é\n,"quoted"'])


@pytest.mark.slow
@pytest.mark.parametrize("hashes", ["own", "colliding"])
@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(NAMES, min_size=1, max_size=100),
    rows=st.lists(st.tuples(NAMES, WORDS, WORDS), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    field=st.sampled_from(["url", "key"]),
)
@example(names=["ab"] * 70, rows=[("ab", "", " "), ("ab", "a", ""), ("ab", "", "a")] * 9, cut=3, field="url")
def test_join_matches_dictionary(hashes, tmp_path_factory, names, rows, cut, field):
    folder = tmp_path_factory.mktemp("join")
    if field == "key":
        names = list(dict.fromkeys(names))
    samples = [
        Sample(name if field == "key" else str(i), "", {"raw": f"{i}"}, url=name if field == "url" else "")
        for i, name in enumerate(names)
    ]
    files = [write_table(folder / "a.csv", rows[:cut]), write_table(folder / "b.parquet", rows[cut:])]
    captions, outcomes = expected(names, rows)
    with pytest.MonkeyPatch.context() as patch:
        if hashes == "colliding":  # by the first letter; read backwards, by the last
            patch.setattr(index, "hash", lambda text: ord((text + " ")[0]), raising=False)
        if not outcomes["joined"] and hashes == "own":
            with pytest.raises(UserError, match=f"None of {len(rows)} caption rows has the {field}"):
                join(folder, samples, files, field)
            return
        try:
            store = join(folder, samples, files, field)
        except UserError:
            assert not outcomes["joined"]
            return
    stored = store.samples(0, store.rows)
    assert [sample.captions for sample in stored] == [{"raw": str(i)} | more for i, more in enumerate(captions)]
    assert [(sample.key, sample.url) for sample in stored] == [(sample.key, sample.url) for sample in samples]
    report = RecaptionReport.read(store.path / "index")
    assert report.joined == outcomes["joined"]
    assert report.found == sum(map(bool, captions))
    assert report.captions == {kind: sum(kind in more for more in captions) for kind in CAPTIONS}
    assert (report.images, report.nameless) == (len(names), names.count(""))
    assert report.rows == len(rows) == report.joined + report.no_image + report.duplicates + report.empty
    if hashes == "own":
        assert {kind: getattr(report, kind) for kind in outcomes} == outcomes
    assert {file.name for file in (store.path / "index").iterdir() if "part" not in file.name} == {
        "sources.json",
        "recaptions.json",
    }


DREAMLIP = ["raw_caption"] + [f"{length}{by}_captions" for by in ("IB", "SV", "LLA") for length in ("short", "long")]
SEVEN = {name.removesuffix("_captions").removesuffix("_caption"): name for name in DREAMLIP}


@pytest.fixture
def recaptioned(pictures):
    """600 pictures with URLs, and DreamLIP's tables of them in another order, without every fifth, in two files."""
    header, *rows = list(csv.reader((pictures / "captions.csv").open()))
    urls = [["url", *header], *([f"http://x/{row[0]}?a=b&c", *row] for row in rows)]
    with (pictures / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(urls)
    captions = [(f"http://x/{i}.png?a=b&c", *(f"{name} of {i}" for name in DREAMLIP)) for i in range(650) if i % 5]
    captions.sort(key=lambda row: hash(row[0][9:]) % 1_000)
    header = ["Image Path", *DREAMLIP]
    write_table(pictures / "cc_3long_3short_1raw_captions_url-0.csv", captions[:200], header)
    write_table(pictures / "cc_3long_3short_1raw_captions_url-1.csv", captions[200:], header)
    manifest = pictures / "pictures.yaml"
    text = manifest.read_text().replace("captions: {raw: caption, long: story}", "captions: {own: caption}\n  url: url")
    joins = json.dumps({"files": "cc_3long*.csv", "url": "Image Path", "captions": SEVEN})
    manifest.write_text(f"{text}\nrecaptions: {joins}\n")
    return pictures


@pytest.mark.slow
def test_join_of_dreamlip_captions(recaptioned):
    store = open_pictures(recaptioned)
    assert store.captions == ("own", *SEVEN)
    for i, sample in enumerate(store.samples(0, 600)):
        joined = {name: f"{column} of {i}" for name, column in SEVEN.items()} if i % 5 else {}
        assert sample.captions == {"own": f"picture {i}"} | joined
    report = RecaptionReport.read(store.path / "index")
    assert (report.found, report.rows, report.no_image, report.duplicates) == (480, 520, 40, 0)
    message = "\n".join(report.lines())
    assert "480 of 600 images (80.0%) matched by url, 7.00 captions each" in message
    assert "40 without image, 0 with the url of an earlier row, 0 empty" in message
    printed = CliRunner().invoke(app, ["status", str(store.path)]).output
    assert message in printed


@pytest.mark.slow
def test_killed_join_resumes_byte_identically(recaptioned, start_warm):
    open_pictures(recaptioned, "whole.zarr")
    for point in (60, 30, 44):  # in the base files, in the join, before the last file
        process = start_warm(open_and_die, recaptioned, "killed.zarr", point, output=recaptioned / "output.txt")
        assert process.wait() == -signal.SIGKILL, process.output
    open_pictures(recaptioned, "killed.zarr")
    assert contents(recaptioned / "killed.zarr") == contents(recaptioned / "whole.zarr")


@pytest.mark.slow
def test_stopped_join_is_repeated_without_reading_the_source(recaptioned, monkeypatch):
    whole = open_pictures(recaptioned, "whole.zarr")

    def die(*_, **__):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecaptionReport, "write", die)
        with pytest.raises(Killed):
            open_pictures(recaptioned)
    manifest = recaptioned / "pictures.yaml"
    text = manifest.read_text()
    manifest.write_text(text.replace('"Image Path"', '"raw_caption"'))
    with pytest.raises(UserError, match="None of 520 caption rows has the url of one of 600 images in column 'raw_cap"):
        open_pictures(recaptioned)
    manifest.write_text(text)
    monkeypatch.setattr("sail_align.extract.store.build_index._read_samples", die)  # the source
    assert contents(open_pictures(recaptioned).path) == contents(whole.path)


@pytest.mark.slow
def test_stopped_join_leaves_no_captions_of_other_names(recaptioned):
    manifest = recaptioned / "pictures.yaml"
    text = manifest.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecaptionReport, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_pictures(recaptioned)
    manifest.write_text(text.replace('"raw": "raw_caption"', '"alt": "raw_caption"'))
    stopped = open_pictures(recaptioned)
    assert contents(stopped.path) == contents(open_pictures(recaptioned, "whole.zarr").path)


@pytest.mark.slow
def test_stopped_join_leaves_no_captions_in_an_index_without_join(recaptioned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecaptionReport, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_pictures(recaptioned)
    manifest = recaptioned / "pictures.yaml"
    manifest.write_text(manifest.read_text().split("\nrecaptions:")[0])
    assert open_pictures(recaptioned).samples(1, 2)[0].captions == {"own": "picture 1"}
    assert "caption.raw" not in pq.read_schema(recaptioned / "s.zarr/index/part-00000.parquet").names


@pytest.mark.slow
def test_accepts_touched_and_rejects_changed_caption_tables(recaptioned):
    store = open_pictures(recaptioned)
    table = recaptioned / "cc_3long_3short_1raw_captions_url-1.csv"
    before = contents(store.path)
    os.utime(table, ns=(1, 1))
    open_pictures(recaptioned)
    after = contents(store.path)
    assert {name for name in after if after[name] != before[name]} == {"index/sources.json"}
    table.write_text(table.read_text().replace("of 33", "of thirty-three"))
    with pytest.raises(UserError, match=r"has captions of cc_3long.*-1\.csv, which has changed since"):
        open_pictures(recaptioned)
    table.unlink()
    with pytest.raises(UserError, match=r"has captions of cc_3long.*-1\.csv, which has changed since"):
        open_pictures(recaptioned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"url": ', '"key": "image", "url": '), "name exactly one column to join by, either 'url' or 'key'"),
        (('"url": "Image Path", ', ""), "name exactly one column to join by, either 'url' or 'key'"),
        (('"raw": "raw_caption"', '"own": "raw_caption"'), "already has a caption 'own'. Rename it under 'recaptions'"),
        (("cc_3long*.csv", "cc_4long*.csv"), "No file matches .*cc_4long"),
        (('"raw_caption"', '"row_caption"'), "has no column 'row_caption'. Its columns are Image Path, raw_caption"),
        (('"raw": ', '"a/b": '), "Caption name 'a/b' is invalid"),
        (('"Image Path"', '"Image Pat"'), "has no column 'Image Pat'. Its columns are Image Path, raw_caption"),
        (("cc_3long*.csv", "lists.parquet"), r"Column 'Image Path' of .*lists\.parquet contains lists"),
    ],
)
def test_rejects_wrong_recaptions_before_building_an_index(recaptioned, change, message):
    lists = {name: pa.array([["a", "b"]]) for name in ("Image Path", *DREAMLIP)}
    pq.write_table(pa.table(lists), recaptioned / "lists.parquet")
    manifest = recaptioned / "pictures.yaml"
    manifest.write_text(manifest.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        open_pictures(recaptioned)
    assert not (recaptioned / "s.zarr").exists()


def test_evaluation_sets_have_no_recaptions(recaptioned):
    manifest = recaptioned / "pictures.yaml"
    manifest.write_text(manifest.read_text().replace("purpose: train", "purpose: evaluate\ntask: {kind: retrieval}"))
    with pytest.raises(UserError, match="'recaptions' belongs to manifests whose purpose is 'train'"):
        open_pictures(recaptioned)


def test_check_reports_missing_tables(recaptioned):
    manifest, data_root = find_manifest(str(recaptioned / "pictures.yaml"))
    assert manifest.is_here(data_root)
    for table in recaptioned.glob("cc_3long*"):
        table.unlink()
    assert not manifest.is_here(data_root)
    assert any("cc_3long*.csv is missing" in text for _, text in check(manifest, data_root))


@pytest.mark.slow
def test_check_reads_tables_to_the_end(recaptioned):
    with (recaptioned / "cc_3long_3short_1raw_captions_url-1.csv").open("a") as file:
        file.write('http://x/1.png,"not closed\n')
    found = list(check(*find_manifest(str(recaptioned / "pictures.yaml"))))
    assert any(not good and "url-1.csv is invalid: got the quotation mark of the field" in text for good, text in found)


@pytest.mark.slow
def test_check_is_not_ready_if_no_caption_joins(recaptioned):
    def findings():
        found = check(*find_manifest(str(recaptioned / "pictures.yaml")))
        return [(good, text) for good, text in found if "in the tables of captions" in text]

    ((good, text),) = findings()
    assert good
    assert not text.startswith("0 ")
    for table in recaptioned.glob("cc_3long*"):
        table.write_text(table.read_text().replace("http", "ftp"))
    ((good, text),) = findings()
    assert not good
    assert text.startswith("0 of these find their url")


@pytest.mark.slow
def test_check_looks_at_all_rows_if_none_of_its_sample_joins(recaptioned):
    about, root = find_manifest(str(recaptioned / "pictures.yaml"))
    source = about.open_source(root)
    strangers = [Sample("k", "", {}, url="ftp://nowhere")]
    ((good, text),) = [each for each in _check_captions(source, strangers, False) if "in the tables" in each[1]]
    assert (good, text[-11:]) == (True, "; others do")
    ((strict, _),) = [each for each in _check_captions(source, strangers, True) if "in the tables" in each[1]]
    assert not strict


def test_img2dataset_images_join_by_url_not_position(tmp_path):
    there = [number for number in range(40) if number % 7]  # the others could not be downloaded
    write_tar(tmp_path / "00000.tar", img2dataset_members(there[:20]))
    write_tar(tmp_path / "00001.tar", img2dataset_members(there[20:]))
    rows = [(f"http://example.org/{number}.jpg", f"long {number}", "") for number in range(40)]
    write_table(tmp_path / "dreamlip.csv", rows)
    (tmp_path / "pictures.yaml").write_text(
        "{name: tars, purpose: train, title: t, licence: l, get: g, source: {kind: webdataset, files: '*.tar', "
        "captions: {raw: txt}}, recaptions: {files: dreamlip.csv, url: Image Path, captions: {long: longSV_captions}}}"
    )
    store = open_pictures(tmp_path)
    told = [sample.captions for sample in store.samples(0, store.rows)]
    assert told == [{"raw": f"picture {number}", "long": f"long {number}"} for number in there]
    report = RecaptionReport.read(store.path / "index")
    assert (report.found, report.joined, report.no_image) == (len(there), len(there), 40 - len(there))
