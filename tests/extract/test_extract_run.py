"""An extraction encodes the shards that are missing, and refuses a store of other samples."""

from pathlib import Path

import pytest
from fakes import FakeText, FakeVision

from sail_align.extract.build import _in_store
from sail_align.extract.data import Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.executor.encode import ArrayTask
from sail_align.extract.executor.run import extract
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store.open_or_create import open_or_create
from sail_align.extract.store.store import Store


def run(root: Path, out: str = "s.zarr"):
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    source = manifest.open_source(data_root)
    store = open_or_create(root / out, manifest, source)
    return extract(store, source, image=FakeVision(), text=FakeText(), captions=source.captions, quiet=True)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_rerun_changes_no_byte_of_a_complete_store(pictures):
    first = run(pictures)
    before = contents(pictures / "s.zarr")
    second = run(pictures)
    assert (first.encoded, second.encoded) == (1_800, 0)
    store = Store.open(pictures / "s.zarr")
    assert store.image().counts == {"ok": 597, "missing": 1, "undecodable": 2}
    assert store.text("long").counts == {"ok": 599, "missing": 1}
    assert contents(pictures / "s.zarr") == before


@pytest.mark.slow
def test_resume_rejects_another_manifest(pictures):
    run(pictures)
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text().replace("long: story", "long: caption"))
    with pytest.raises(UserError, match="made from another manifest: source"):
        run(pictures)


@pytest.mark.slow
def test_resume_rejects_other_samples(pictures):
    run(pictures)
    table = pictures / "captions.csv"
    table.write_text(table.read_text().replace("picture 3,", "another picture,"))
    with pytest.raises(UserError, match=r"sample '3\.png' in row 3"):
        run(pictures)


@pytest.mark.slow
def test_progress_includes_shards_of_an_earlier_run(pictures, capfd):
    manifest, root = find_manifest(str(pictures / "pictures.yaml"))
    source = manifest.open_source(root)
    store = open_or_create(pictures / "s.zarr", manifest, source)
    extract(store, source, image=FakeVision(), text=None, captions=[])
    store.image().discard(0)
    summary = extract(store, source, image=FakeVision(), text=None, captions=[])
    assert summary.encoded == 256
    assert "600/600" in capfd.readouterr().err


def test_store_without_a_caption_is_resumed_without_it(tmp_path):
    """As one of tars whose texts an earlier version did not use."""
    path = tmp_path / "s.zarr"
    store = Store.create(path, dataset="d", manifest={}, parts=[Part.of([Sample("a", "a.jpg")])], captions=[])
    assert _in_store(["raw"], path) == []
    assert _in_store(["raw"], tmp_path / "new.zarr") == ["raw"]
    with pytest.raises(UserError, match=r"s\.zarr has no caption 'raw'\. Pass another --out"):
        ArrayTask.for_caption(store, "raw", FakeText())
    assert not (path / "text").exists()
