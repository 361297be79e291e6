"""An extraction that was killed and run again leaves the same bytes as one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeText, FakeVision

from sail_align.extract.engine import extract
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest
from sail_align.extract.sources import open_source
from sail_align.extract.store import Store, open_or_create

# Runs the extraction and dies by SIGKILL just before it opens its n-th file for writing or renames it.
KILLED = """
import os, signal, sys
from pathlib import Path
import test_engine

left = int(sys.argv[2])

def dying(method):
    def wrapper(self, *args, **kwargs):
        global left
        writes = method is Path.replace or any("w" in str(mode) for mode in args)
        left -= writes
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)
    original = method
    return wrapper

Path.open, Path.replace = dying(Path.open), dying(Path.replace)
test_engine.run(Path(sys.argv[1]))
"""


def run(root: Path, out: str = "killed.zarr"):
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    source = open_source(manifest, data_root)
    store = open_or_create(root / out, manifest, source)
    return extract(store, source, image=FakeVision(), text=FakeText(), captions=source.captions, quiet=True)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_store_killed_at_many_points_is_byte_identical(pictures):
    run(pictures, "whole.zarr")
    deaths = 0
    for point in (1, 4, 7, 10, 13, 19):
        command = [sys.executable, "-c", KILLED, str(pictures), str(point)]
        environment = {"PYTHONPATH": str(Path(__file__).parent) + ":" + str(Path(__file__).parents[1])}
        deaths += subprocess.run(command, env=environment, check=False).returncode == -9
    assert deaths == 6
    last = run(pictures)
    assert 0 < last.encoded < 1_800
    assert contents(pictures / "killed.zarr") == contents(pictures / "whole.zarr")
    assert Store.open(pictures / "killed.zarr").digest == Store.open(pictures / "whole.zarr").digest


def test_a_finished_store_is_left_alone(pictures):
    first = run(pictures)
    before = contents(pictures / "killed.zarr")
    second = run(pictures)
    assert (first.encoded, second.encoded) == (1_800, 0)
    store = Store.open(pictures / "killed.zarr")
    assert store.image().counts == {"ok": 597, "missing": 1, "undecodable": 2}
    assert store.text("long").counts == {"ok": 599, "missing": 1}
    assert contents(pictures / "killed.zarr") == before


def test_a_store_of_another_manifest_is_not_gone_on_with(pictures):
    run(pictures)
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text().replace("long: story", "long: caption"))
    with pytest.raises(UserError, match="made from a manifest whose source"):
        run(pictures)


def test_a_store_of_other_samples_is_not_gone_on_with(pictures):
    run(pictures)
    table = pictures / "captions.csv"
    table.write_text(table.read_text().replace("picture 3,", "another picture,"))
    with pytest.raises(UserError, match=r"sample '3\.png' in row 3"):
        run(pictures)


def test_progress_counts_on_from_what_is_there(pictures, capfd):
    manifest, root = find_manifest(str(pictures / "pictures.yaml"))
    source = open_source(manifest, root)
    store = open_or_create(pictures / "s.zarr", manifest, source)
    extract(store, source, image=FakeVision(), text=None, captions=[])
    store.image().discard(0)
    summary = extract(store, source, image=FakeVision(), text=None, captions=[])
    assert summary.encoded == 256
    assert "600/600" in capfd.readouterr().err
