"""sail-extract download: the real img2dataset on a small server, its tars joined with captions in DreamLIP's form, and
the error messages.
"""

import csv
import errno
import json
import os
import shutil
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sail_align.extract.download import Downloaded
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store.open_or_create import open_or_create

COLUMNS = ["raw_caption"] + [f"{length}{by}_captions" for by in ("IB", "SV", "LLA") for length in ("short", "long")]
"""DreamLIP's, after `Image Path`."""

FAKE_PROGRAM = """#!{python}
import json, os, sys
folder = next(word.split("=")[1] for word in sys.argv if word.startswith("--output_folder="))
print(json.dumps(sys.argv[1:]), file=open(os.path.join(folder, "called.json"), "w"))
json.dump({{"count": 10, "successes": 7}}, open(os.path.join(folder, "00000_stats.json"), "w"))
sys.exit({code})
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """Serve twelve photos; return the root of the data, its manifest, and the photos' URLs with one that is dead."""
    (tmp_path / "web").mkdir()
    for i in range(12):
        Image.new("RGB", (300 + i, 200), (20 * i, 0, 0)).save(tmp_path / "web" / f"{i}.jpg")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web"))
    Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_port}/{i}.jpg" for i in range(12)] + [
        f"http://127.0.0.1:{server.server_port}/gone.jpg"
    ]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Image Path", *COLUMNS])
        for i, url in reversed(list(enumerate(urls))):
            table.writerow([url, *(f"{name} of {i},\nin two lines" for name in COLUMNS)])
    (tmp_path / "some.yaml").write_text(MANIFEST)
    yield tmp_path, tmp_path / "some.yaml", urls
    server.shutdown()
    server.server_close()


MANIFEST = """
name: some
purpose: train
title: A few photos
licence: none
get: made by a test
download: {table: captions.csv, url: Image Path, caption: raw_caption, folder: some, image_size: 128}
source: {kind: webdataset, root: some}
recaptions:
  files: captions.csv
  url: Image Path
  captions: {raw: raw_caption, long: longSV_captions}
"""


def install_fake(tmp_path: Path, monkeypatch, code: int = 0) -> None:
    """Replace img2dataset by a program that records how it was called."""
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text(FAKE_PROGRAM.format(python=sys.executable, code=code))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
def test_calls_img2dataset_and_sums_its_reports(web, typed, tmp_path, monkeypatch):
    _, manifest, urls = web
    install_fake(tmp_path, monkeypatch)
    code, out, _ = typed("download", str(manifest), "--processes", "3", "--quiet")
    assert code == 0
    assert out == f"some: 7 images from 10 URLs (70.0%); 3 URLs left\nNext: sail-extract run {manifest}\n"
    listed, *options = json.loads((tmp_path / "some" / "called.json").read_text())
    assert {"--processes_count=3", "--thread_count=64", "--image_size=128", "--output_format=webdataset"} < set(options)
    rows = pq.read_table(listed).to_pylist()
    assert [row["url"] for row in rows] == urls[::-1]
    assert rows[-1]["caption"] == "raw_caption of 0,\nin two lines"


@pytest.mark.slow
def test_names_truncated_report(web, typed, tmp_path, monkeypatch):
    _, manifest, _ = web
    install_fake(tmp_path, monkeypatch)
    typed("download", str(manifest), "--quiet")
    report = next((tmp_path / "some").glob("*_stats.json"))
    report.write_text(report.read_text()[:-5])
    with pytest.raises(UserError, match=r"_stats\.json is not valid JSON .*; unless it is being written"):
        Downloaded.read(tmp_path / "some")


@pytest.mark.slow
def test_url_list_is_written_once(web, typed, tmp_path, monkeypatch):
    """Finished tars are known by their number, so the list must not change."""
    _, manifest, _ = web
    install_fake(tmp_path, monkeypatch)
    typed("download", str(manifest), "--quiet")
    before = (tmp_path / "some-urls.parquet").read_bytes()
    (tmp_path / "captions.csv").write_text("Image Path,raw_caption\nhttp://other,other\n")
    assert typed("download", str(manifest), "--quiet")[0] == 0
    assert (tmp_path / "some-urls.parquet").read_bytes() == before


def test_full_disk_is_reported_and_leaves_no_part_of_the_url_list(web, typed, tmp_path, monkeypatch):
    _, manifest, _ = web
    install_fake(tmp_path, monkeypatch)
    with monkeypatch.context() as full:
        full.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        code, _, err = typed("download", str(manifest), "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "No space is left" in err
    assert list(tmp_path.glob("*urls*")) == list(tmp_path.glob(".*urls*")) == []
    assert typed("download", str(manifest), "--quiet")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"download": None}, "some is not downloaded with img2dataset; `sail-extract check some` shows how to get it."),
        ({"table": "other.csv"}, "other.csv is missing; `sail-extract check some` shows how to get it."),
        ({"url": "URL"}, "captions.csv has no column 'URL'. Its columns are Image Path, raw_caption"),
        ({}, "img2dataset failed with exit code 5, see above. Rerun the same command to resume."),
    ],
)
def test_error_messages(web, typed, tmp_path, monkeypatch, change, message):
    _, manifest, _ = web
    install_fake(tmp_path, monkeypatch, code=5)
    content = yaml.safe_load(MANIFEST)
    content["download"] = None if "download" in change else content["download"] | change
    manifest.write_text(yaml.safe_dump(content))
    code, _, err = typed("download", str(manifest), "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.slow
def test_missing_img2dataset_names_the_extra(web, typed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = typed("download", str(web[1]))
    assert (code, err) == (2, "error: img2dataset is not installed: pip install 'sail-align[download]'.\n")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("img2dataset"), reason="img2dataset is not installed (extra download)")
def test_tars_of_real_img2dataset_join_by_url(web, typed):
    root, manifest, urls = web
    code, out, _ = typed("download", str(manifest), "--processes", "1", "--threads", "4", "--quiet")
    assert code == 0
    assert "some: 12 images from 13 URLs (92.3%); 0 URLs left" in out
    written = (root / "some" / "00000.tar").stat().st_mtime_ns
    assert typed("download", str(manifest), "--processes", "1", "--quiet")[0] == 0
    assert (root / "some" / "00000.tar").stat().st_mtime_ns == written

    code, out, _ = typed("check", str(manifest))
    assert (code, "  ok   12 of these find their url in the tables of captions: raw, long\n" in out) == (0, True)

    about, data_root = find_manifest(str(manifest))
    source = about.open_source(data_root)
    store = open_or_create(root / "some.zarr", about, source, quiet=True)
    rows = store.index(["image", "url", "caption.raw", "caption.long"], 0, store.rows).to_pylist()
    assert {row["url"] for row in rows} == set(urls[:12])
    for row in rows:
        number = urls.index(row["url"])
        image = source.image(row["image"])
        assert min(image.size) == 128
        assert abs(image.getpixel((60, 60))[0] - 20 * number) < 5  # the photo of these captions
        assert row["caption.long"] == f"longSV_captions of {number},\nin two lines"
        assert row["caption.raw"] == f"raw_caption of {number},\nin two lines"


def test_only_web_addresses_are_downloaded(web, typed, tmp_path, monkeypatch):
    """img2dataset also opens file: and ftp: URLs."""
    _, manifest, _ = web
    install_fake(tmp_path, monkeypatch)
    bad = "file:///etc/passwd,a\n/etc/passwd,b\nftp://host/x.jpg,c\n,d\n"
    (tmp_path / "captions.csv").write_text(f"Image Path,raw_caption\n{bad}")
    code, _, err = typed("download", str(manifest), "--quiet")
    assert code == 2
    assert "captions.csv has no http or https URL in column 'Image Path'" in err
    (tmp_path / "captions.csv").write_text(f"Image Path,raw_caption\n{bad}HTTP://host/y.jpg,e\n")
    assert typed("download", str(manifest), "--quiet")[0] == 0
    assert pq.read_table(tmp_path / "some-urls.parquet")["url"].to_pylist() == ["HTTP://host/y.jpg"]
