"""Files that are written whole, and clean-up that removes nothing of others."""

import os

import pytest

from sail_align.extract.system.files import open_atomically, remove_own, write_atomically

RANDOM = "0123456789abcdef" * 2


def test_stream_replaces_the_file_at_the_end(tmp_path):
    path = tmp_path / "new" / "x.parquet"
    with open_atomically(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["x.parquet"]


def test_failed_stream_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write():
        with open_atomically(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("write", [write_atomically, lambda path, content: write_by_stream(path, content)])
def test_writing_follows_no_planted_link_and_removes_only_its_own_leftovers(tmp_path, write):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    path = tmp_path / "out" / "x"
    path.parent.mkdir()
    for name in (f".x.{RANDOM}.tmp", ".x.tmp", ".x.mine.tmp"):
        (path.parent / name).symlink_to(target)
    write(path, b"content")
    assert sorted(os.listdir(path.parent)) == [".x.mine.tmp", ".x.tmp", "x"]
    assert target.read_bytes() == b"precious"
    assert path.read_bytes() == b"content"
    path.unlink()
    path.symlink_to(target)
    write(path, b"content")
    assert target.read_bytes() == b"precious"
    assert not path.is_symlink()


def write_by_stream(path, content):
    with open_atomically(path) as file:
        file.write(content)


def test_only_named_files_are_removed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    for name in ("a", f".a.{RANDOM}.tmp", ".a.other.tmp", "c"):
        (folder / name).touch()
    remove_own(folder, ["a", "b", "missing"])
    assert sorted(os.listdir(folder)) == [".a.other.tmp", "b", "c"]
    for name in (".a.other.tmp", "c"):
        (folder / name).unlink()
    (folder / "b").rmdir()
    (folder / "a").symlink_to(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(folder)
    remove_own(link, ["a"])
    assert (folder / "a").is_symlink()
    assert not link.is_symlink()
    remove_own(folder, ["a"])
    assert not folder.exists()
    remove_own(folder, ["a"])
