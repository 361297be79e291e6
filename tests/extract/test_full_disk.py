"""A full disk ends a run with a clear message. Once there is space, the run resumes."""

import errno
import os
import stat
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeChoice

from sail_align.extract.errors import UserError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import store as store_module
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import open_atomically, report_write_errors, write_atomically


def extract_into(root: Path, store: Path):
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    job = Job(manifest, data_root, store, FakeChoice("image"), FakeChoice("text"), ("raw", "long"))
    return run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def runs_out_of_space(root: Path, store: Path) -> bool:
    try:
        extract_into(root, store)
    except UserError as problem:
        return "No space is left" in str(problem)
    return False


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, and a function that enlarges it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system of a small size can be mounted here: {mounted.stderr.strip()}")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_run_reports_a_full_disk_and_resumes_once_there_is_space(pictures, small_disk, monkeypatch):
    monkeypatch.setattr(store_module, "_shard_rows", lambda rows: 16)
    disk, enlarge = small_disk
    with pytest.raises(
        UserError, match=r"No space is left for .*s\.zarr \(No space left on device\)\. Free some and rerun"
    ):
        extract_into(pictures, disk / "s.zarr")
    done = sum(len(array.markers) for array in Store.open(disk / "s.zarr").arrays())
    assert done > 0
    assert not [name for name in contents(disk / "s.zarr") if name.endswith(".tmp") or name.startswith("leases")]
    enlarge()
    assert extract_into(pictures, disk / "s.zarr").encoded > 0
    extract_into(pictures, pictures / "whole.zarr")
    assert contents(disk / "s.zarr") == contents(pictures / "whole.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_at_any_file_leaves_no_partial_files(pictures, monkeypatch, number):
    extract_into(pictures, pictures / "whole.zarr")
    whole = contents(pictures / "whole.zarr")
    left = 0

    def full(path, content, **below):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, "full")
        write_atomically(path, content, **below)

    for module in ("features", "hierarchy", "markers", "index"):
        monkeypatch.setattr(f"sail_align.extract.store.{module}.write_atomically", full)
    ends = 0
    for files in range(0, 60, 7):
        left = files
        ends += runs_out_of_space(pictures, pictures / "s.zarr")
        assert not (pictures / "s.zarr" / "leases").exists()
    assert ends >= 3
    assert contents(pictures / "s.zarr") == whole


def test_writer_retries_if_its_temporary_file_is_removed(tmp_path, monkeypatch):
    fsync, others = os.fsync, tmp_path / ".marker.other.tmp"

    def slow(descriptor):
        if not others.exists():  # another writer removes this one's file and starts its own
            for file in tmp_path.glob("*.tmp"):
                file.unlink()
            others.write_text("half")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    write_atomically(tmp_path / "marker", b"whole")
    assert (tmp_path / "marker").read_bytes() == b"whole"
    assert others.exists()


@pytest.mark.parametrize(("number", "raised"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_failed_sync_of_a_folder_is_an_error_unless_unsupported(tmp_path, monkeypatch, number, raised):
    fsync = os.fsync

    def fail_for_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    expected = pytest.raises(UserError, match="rerun the same command") if raised else nullcontext()
    with expected, report_write_errors(tmp_path, during_run=True):
        write_atomically(tmp_path / "marker", b"whole")


def test_read_only_disk_is_reported_also_by_operations_on_descriptors(tmp_path):
    with pytest.raises(UserError, match="Read-only file system"), report_write_errors(tmp_path, during_run=True):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_streamed_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lists" / "rows"
    for content in (b"first", b"second"):
        with suppress(KeyError), open_atomically(path) as file:
            file.write(content)
            file.flush()
            raise KeyError
        assert list(path.parent.iterdir()) == ([] if content == b"first" else [path])
        with open_atomically(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    (path.parent / ".rows.0.tmp").write_bytes(b"of a killed process")
    with open_atomically(path) as file:
        file.write(b"third")
    assert list(path.parent.iterdir()) == [path]


def test_temporary_files_never_follow_planted_links(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"precious")
    monkeypatch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="0"))
    monkeypatch.setattr("sail_align.extract.system.files._remove_leftovers", lambda _: None)
    (tmp_path / ".marker.0.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "marker", b"whole")
    assert (tmp_path / "victim").read_bytes() == b"precious"
