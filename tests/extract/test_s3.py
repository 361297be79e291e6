"""Stores on an S3 server: leases are conditional puts, and two workers that are killed and resumed do no work twice."""

import errno
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from fakes import FakeChoice
from moto.server import DomainDispatcherApplication, create_backend_app
from warm_processes import run_command
from werkzeug.serving import WSGIRequestHandler, make_server

from sail_align.extract.encoders import load
from sail_align.extract.executor import job  # noqa: F401 (its annotations need the real classes)
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store import store as store_module
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import as_path
from sail_align.extract.system.leases import LeaseLostError, Leases

SHARD_ROWS = 200
SHARDS = 6
"""Shards of the 600 images and of a caption of each."""


class Server:
    """An S3 server in a thread of this process, which answers one request at a time.

    A conditional put is atomic on S3. With several requests at a time, moto looks first and writes later.
    """

    def __init__(self):
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.http = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=QuietHandler)
        self.url = f"http://127.0.0.1:{self.http.port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def _answer(self, request, start_response):
        with self._lock:
            return list(self._app(request, start_response))


class QuietHandler(WSGIRequestHandler):
    def log(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.http.shutdown()


@pytest.fixture
def bucket(server, monkeypatch):
    """The URL of an empty bucket, for this process and its children."""
    import s3fs

    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    for name, value in zip(names, (server.url, "test", "test", "us-east-1"), strict=True):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(use_listings_cache=False)
    if files.exists("features"):
        files.rm("features", recursive=True)
    files.mkdir("features")
    return "s3://features"


def contents(path) -> dict[str, bytes]:
    start = len(path.as_posix())
    return {file.as_posix()[start:]: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run(data: Path, out: str, log: Path, seconds: float) -> None:
    """Run `sail-extract run` with encoders that log each batch and take so many seconds for it."""
    FakeChoice.download = lambda choice: None
    store_module._shard_rows = lambda rows: SHARD_ROWS
    for name, modality in (("ImageEncoderConfig", "image"), ("TextEncoderConfig", "text")):
        choice = FakeChoice(modality, log, seconds)
        setattr(load, name, lambda *names, choice=choice, **options: choice)
    run_command("sail-extract", "run", str(data), "--out", out, "--captions", "raw", "--quiet")


def encoded(log: Path) -> Counter:
    return Counter(log.read_text().splitlines())


@pytest.mark.slow
def test_two_workers_on_s3_are_killed_and_resume_without_repeating_work(pictures, bucket, start_warm):
    data, url, output = pictures / "pictures.yaml", f"{bucket}/s.zarr", pictures / "output"
    local, before, after = (pictures / name for name in ("local", "before", "after"))
    reference = start_warm(run, data, str(pictures / "s.zarr"), local, 0.0, output=output)
    workers = [start_warm(run, data, url, before, 0.15, output=output) for _ in range(2)]

    def committed() -> int:
        time.sleep(0.1)  # between requests
        return len(list(as_path(f"{url}/commits").rglob("*.json")))

    workers[0].wait_until(lambda: committed() >= SHARDS // 4)
    for worker in workers:
        worker.close()
    assert committed() < SHARDS
    workers = [start_warm(run, data, url, after, 0.02, output=output) for _ in range(2)]
    assert [each.wait() for each in (reference, *workers)] == [0] * 3, reference.output

    once = encoded(local)
    assert set(encoded(before).values()) == set(encoded(after).values()) == {1}  # no worker repeats another's work
    repeated = encoded(before) + encoded(after) - once
    assert repeated.total() <= 2 * 2 * 4  # each worker encoded a shard and wrote another, of up to four batches
    assert set(encoded(before) | encoded(after)) == set(once)
    assert contents(as_path(url)) == contents(pictures / "s.zarr")
    assert Store.open(url).digest == Store.open(pictures / "s.zarr").digest
    assert [text for text, is_damage in verify_store(url) if is_damage] == []


def test_one_of_many_processes_gets_a_lease_on_s3(bucket):
    rivals = [Leases(as_path(f"{bucket}/s.zarr/leases")) for _ in range(6)]
    with ThreadPoolExecutor(len(rivals)) as pool:
        for generation in range(5):
            together = threading.Barrier(len(rivals), timeout=60)

            def take(leases, name=f"image/x/{generation:05d}", together=together):
                together.wait()
                return leases.take(name)

            owners = [lease for lease in pool.map(take, rivals) if lease]
            assert len(owners) == 1
            owners[0].confirm()


def test_lease_of_a_dead_process_on_s3_is_taken_over_once(bucket):
    first, *rivals = [Leases(as_path(f"{bucket}/s.zarr/leases"), ttl=0.5) for _ in range(4)]
    dead = first.take("x")
    dead.file.write_bytes(dead.content.replace(b'"machine": "', b'"machine": "another '))
    assert [leases.take("x") for leases in rivals] == [None] * 3
    time.sleep(0.6)
    with ThreadPoolExecutor(3) as pool:
        taken = [lease for lease in pool.map(lambda leases: leases.take("x"), rivals) if lease]
    assert [lease.generation for lease in taken] == [1]
    with pytest.raises(LeaseLostError):
        dead.confirm()


def error_of_s3(code: str) -> OSError:
    """Return the error of s3fs for an error code that it does not know."""
    problem = OSError(errno.EIO, "An error occurred")
    problem.__cause__ = ClientError({"Error": {"Code": code}}, "PutObject")
    return problem


@pytest.mark.parametrize(
    "answer", [FileExistsError("x"), error_of_s3("ConditionalRequestConflict"), error_of_s3("PreconditionFailed")]
)
def test_refused_conditional_put_is_a_lease_of_another(bucket, monkeypatch, answer):
    leases = Leases(as_path(f"{bucket}/s.zarr/leases"))

    def refuse(*args, **kwargs):
        raise answer

    monkeypatch.setattr(leases.folder.fs, "pipe_file", refuse)
    assert leases.take("x") is None


def test_lost_answer_to_a_conditional_put_does_not_lose_the_lease(bucket, monkeypatch):
    leases = Leases(as_path(f"{bucket}/s.zarr/leases"))
    put = leases.folder.fs.pipe_file

    def put_twice(*args, **kwargs):
        put(*args, **kwargs)
        put(*args, **kwargs)

    monkeypatch.setattr(leases.folder.fs, "pipe_file", put_twice)
    leases.take("x").confirm()


def test_failed_conditional_put_is_an_error(bucket, monkeypatch):
    leases = Leases(as_path(f"{bucket}/s.zarr/leases"))

    def refuse(*args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(leases.folder.fs, "pipe_file", refuse)
    with pytest.raises(PermissionError):
        leases.take("x")
