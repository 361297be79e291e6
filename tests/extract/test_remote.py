"""A store at a URL has the same bytes as a local one, and only whole objects are written."""

import re

import pytest
from fakes import FakeChoice

from sail_align.extract.errors import UserError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import as_path, report_read_errors
from sail_align.extract.system.leases import Leases

pytest.importorskip("upath")


@pytest.fixture
def url():
    import fsspec

    yield "memory://bucket/s.zarr"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def contents(path) -> dict[str, bytes]:
    start = len(path.as_posix())
    return {file.as_posix()[start:]: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def make(root, store):
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    job = Job(manifest, data_root, as_path(store), FakeChoice("image"), FakeChoice("text"), ("raw", "long"))
    return run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)


@pytest.mark.slow
def test_store_at_a_url_is_created_read_and_resumed(pictures, url):
    make(pictures, str(pictures / "local.zarr"))
    assert make(pictures, url).encoded == 1_800
    assert contents(as_path(url)) == contents(pictures / "local.zarr")
    local, remote = Store.open(pictures / "local.zarr"), Store.open(url)
    assert remote.digest == local.digest
    assert remote.image().read(250, 300)[0].tobytes() == local.image().read(250, 300)[0].tobytes()
    assert remote.samples(10, 20) == local.samples(10, 20)
    assert [text for text, is_damage in verify_store(url) if is_damage] == []
    remote.image().discard(1)
    remote.text("long").discard(0)
    assert make(pictures, url).encoded == 512
    assert contents(as_path(url)) == contents(pictures / "local.zarr")
    assert len(as_path(f"{url}.log.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_unfinished_index_at_a_url_is_rewritten(pictures, url):
    as_path(f"{url}/index/part-00000.parquet").write_bytes(b"of something else")
    make(pictures, url)
    assert Store.open(url).rows == 600
    assert not list(as_path(url).glob("leases/**/*.json"))


def test_lease_at_a_url_has_one_owner(url):
    leases = Leases(as_path(url) / "leases")
    lease = leases.take("image/x/00001")
    lease.confirm()
    assert Leases(leases.folder).take("image/x/00001") is None
    lease.renew()
    lease.confirm()
    assert leases.names() == {"image/x/00001"}
    leases.release(lease)
    assert leases.names() == set()


def test_unknown_protocol_is_rejected():
    with pytest.raises(UserError, match=r"nosuch://bucket/s\.zarr cannot be used"):
        as_path("nosuch://bucket/s.zarr")


def test_heartbeat_does_not_recreate_a_released_lease(url):
    leases = Leases(as_path(f"{url}/leases"))
    lease = leases.take("x")
    lease.renew()
    assert lease.file.read_bytes() == lease.content + b"."
    leases.release(lease)
    lease.renew()
    assert not lease.file.exists()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (PermissionError("Access Denied"), "cannot be read (Access Denied). Fix this and try again."),
        (TimeoutError("no answer"), "cannot be read (no answer). Fix this and try again."),
        (
            FileNotFoundError("s.zarr/zarr.json"),
            "is missing or damaged. Restore it or rerun the extraction, after",
        ),
        (
            OSError("Couldn't deserialize thrift"),
            "is missing or damaged. Restore it or rerun the extraction, after",
        ),
    ],
)
def test_errors_of_object_storage_are_not_reported_as_damage(url, problem, message):
    """fsspec file systems raise errors without errno."""
    with pytest.raises(UserError, match=re.escape(f"{url} {message}")), report_read_errors(as_path(url)):
        raise problem
