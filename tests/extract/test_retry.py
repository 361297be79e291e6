"""A retry encodes failed images that are now readable; all other bytes stay as they are."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from fakes import FakeChoice, FakeVision
from PIL import Image

from sail_align.extract.errors import UserError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.retry import RetrySummary, retry_failed
from sail_align.extract.executor.run import extract
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store.open_or_create import open_or_create
from sail_align.extract.store.store import Store


def run(root, out="s.zarr"):
    """Extract the images of `pictures`. Rows 7, 11 and 13 fail, all of them in shard 0 of 3."""
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    source = manifest.open_source(data_root)
    store = open_or_create(root / out, manifest, source)
    extract(store, source, image=FakeVision(), text=None, captions=[], quiet=True)
    return store, source


def retry(root, share=None):
    """Retry the failed images of the store of `run`."""
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    job = Job(manifest, data_root, root / "s.zarr", FakeChoice("image"), None, ())
    return retry_failed(job, share or Share(), "cpu", quiet=True)


def contents(store):
    files = [file for file in store.path.rglob("*") if file.is_file()]
    return {str(file.relative_to(store.path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def put(root, number):
    colours = np.random.default_rng(number).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(colours).save(root / "images" / f"{number}.png")


@pytest.mark.slow
def test_retried_store_equals_one_made_with_the_images_present(pictures):
    shutil.move(pictures / "images/400.png", pictures / "400.png")
    store, _ = run(pictures)
    before = contents(store)
    for number in (7, 13):
        put(pictures, number)
    shutil.move(pictures / "400.png", pictures / "images/400.png")
    retried = retry(pictures)
    assert retried == RetrySummary(tried=4, encoded=3, shards=2)
    assert Store.open(store.path).image().counts == {"ok": 599, "undecodable": 1}
    whole, _ = run(pictures, "whole.zarr")
    after = contents(store)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in contents(whole).items()
    }
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {
        f"{folder}/{name}"
        for shard in (0, 1)
        for folder, name in (
            ("image/fake-image/features/c", f"{shard}/0"),
            ("image/fake-image/status/c", f"{shard}"),
            ("commits/image/fake-image", f"{shard:05d}.json"),
        )
    }


@pytest.mark.slow
def test_retry_without_change_writes_nothing(pictures):
    store, _ = run(pictures)
    before = contents(store)
    assert retry(pictures) == RetrySummary(tried=3)
    assert contents(store) == before


@pytest.mark.slow
def test_another_failure_status_is_written(pictures):
    store, _ = run(pictures)
    (pictures / "images/7.png").write_text("not an image either")
    assert retry(pictures) == RetrySummary(tried=3, shards=1)
    assert Store.open(store.path).image().counts == {"ok": 597, "undecodable": 3}


@pytest.mark.slow
def test_retry_reads_only_failed_rows_of_its_share(pictures, monkeypatch):
    (pictures / "images/300.png").unlink()
    _, source = run(pictures)
    seen = []
    image = type(source).image

    def noting(self, location, least=0):
        seen.append(location)
        return image(self, location, least)

    monkeypatch.setattr(type(source), "image", noting)
    retry(pictures, Share(1, 3))
    assert sorted(seen) == ["11.png", "13.png", "7.png"]
    seen.clear()
    retry(pictures, Share(2, 3))
    assert seen == ["300.png"]


@pytest.mark.slow
def test_retry_rejects_a_damaged_shard(pictures):
    store, _ = run(pictures)
    put(pictures, 7)
    shard = store.path / "image/fake-image/features/c/0/0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard 0 is damaged: its features .* Use `sail-extract verify --discard`"):
        retry(pictures)
    assert shard.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image/fake-image/00000", "retry/image/fake-image/00000"])
def test_retry_skips_shards_of_other_processes(pictures, name):
    store, _ = run(pictures)
    put(pictures, 7)
    other = Store.open(store.path)
    lease = other.leases.take(name)
    retried = retry(pictures)
    assert retried == RetrySummary(tried=0 if "retry" in name else 3, left=1)
    assert "1 shards are in use by another process" in str(retried)
    other.leases.release(lease)
    with ProcessPoolExecutor(2, get_context("fork")) as both:
        found = list(both.map(retry, [pictures] * 2))
    assert sum(each.encoded for each in found) == 1
    assert Store.open(store.path).image().counts == {"ok": 598, "undecodable": 2}
    assert not (store.path / "leases").exists()


@pytest.mark.slow
def test_tidy_keeps_the_lease_of_a_retry(pictures):
    store, _ = run(pictures)
    retrying, done, dead = Store.open(store.path), "image/fake-image/00000", "image/fake-image/00001"
    lease = retrying.leases.take(done)
    other = retrying.leases.take(dead)
    other.file.write_bytes(other.content.replace(b'"machine": "', b'"machine": "another '))
    store.tidy()
    lease.confirm()
    assert store.leases.names() == {done}


@pytest.mark.slow
def test_retry_without_failures_loads_no_encoder(pictures, monkeypatch):
    for number in (7, 11, 13):
        put(pictures, number)
    run(pictures)
    monkeypatch.setattr(FakeChoice, "load", None)
    assert str(retry(pictures)) == "no failed images to retry"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retry", "all"], "--retry 'all' is invalid: expected failed"),
        (["--retry", "failed", "--workers", "2"], "--retry works in one process"),
    ],
)
def test_invalid_options_are_user_errors(pictures, typed, options, message):
    code, _, err = typed("run", str(pictures / "pictures.yaml"), *options)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_command_reports_the_retry(pictures, typed):
    encoders = ["--image-encoder", "efficientnet-lite0", "--image-size", "64", "--text-encoder", "minilm-l6"]
    command = [
        "run",
        str(pictures / "pictures.yaml"),
        "--out",
        str(pictures / "out.zarr"),
        "--quiet",
        *encoders,
        "--captions",
        "raw",
    ]
    assert typed(*command)[0] == 0
    put(pictures, 7)
    code, printed, _ = typed(*command, "--retry", "failed")
    assert code == 0
    assert "3 failed images retried, 1 encoded, 1 shards rewritten." in printed
    assert "598 ok, 2 undecodable" in printed
    marker = pictures / "out.zarr/commits/image/efficientnet-lite0/00000.json"
    assert json.loads(marker.read_text())["counts"] == {"ok": 254, "undecodable": 2}
    assert "no problems found" in typed("verify", str(pictures / "out.zarr"))[1]
