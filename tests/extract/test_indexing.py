"""Building an index is resumable byte for byte, and a source is read again only if it changed."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import Killed, contents, open_and_die, open_pictures, shrink

from sail_align.extract.data import Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.store import build_index, index
from sail_align.extract.store.open_or_create import _SourceCheck
from sail_align.extract.store.store import Store


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """Index files of 32 rows in groups of 8, of which the record is written for each of the first four."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        patch.setattr(build_index, "RECORDS", 2)
        yield


def parts_of(sizes, folder, read=lambda part, row: None):
    """Return parts of the given sizes, each with a file. `read` is called for every sample."""

    def samples(part, size):
        for row in range(size):
            read(part, row)
            yield Sample(
                f"{part}/{row}", f"{row}.jpg", {"raw": f"words {part} {row}"} if row % 3 else {}, url=f"u{row}"
            )

    files = [folder / f"{part}.tar" for part in range(len(sizes))]
    for file in files:
        if not file.exists():
            file.write_text("stands for the samples")
    return [Part(file.name, partial(samples, n, sizes[n]), (file,)) for n, file in enumerate(files)]


def create(path, parts, **changes):
    about = {"dataset": "set", "manifest": {"name": "set"}, "captions": ["raw"], "quiet": True} | changes
    return Store.create(path, parts=parts, **about)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any),
    deaths=st.lists(st.tuples(st.sampled_from(["sample", "write"]), st.integers(1, 120)), max_size=4),
)
def test_stopped_index_resumes_byte_identically(tmp_path_factory, sizes, deaths):
    folder = tmp_path_factory.mktemp("index")
    whole = create(folder / "whole.zarr", parts_of(sizes, folder))
    for kind, after in deaths:
        left = [after if kind == "sample" else after // 8]

        def count(*_, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        def write(path, content, write=index.write_atomically, count=count):
            count()
            write(path, content)

        with pytest.MonkeyPatch.context() as patch:
            if kind == "write":
                patch.setattr("sail_align.extract.store.index.write_atomically", write)
            try:
                create(folder / "stopped.zarr", parts_of(sizes, folder, count if kind == "sample" else lambda *_: None))
            except Killed:
                continue
        shutil.rmtree(folder / "stopped.zarr")
    create(folder / "stopped.zarr", parts_of(sizes, folder))
    assert contents(folder / "stopped.zarr") == contents(whole.path)
    assert [s.key for s in whole.samples(0, whole.rows)] == [f"{p}/{r}" for p, n in enumerate(sizes) for r in range(n)]


def stop_in(path, folder, sizes, part, row):
    """Leave an index that was stopped just before a sample."""

    def die(*at):
        if at == (part, row):
            raise Killed

    with pytest.raises(Killed):
        create(path, parts_of(sizes, folder, die))


def test_complete_parts_are_not_read_again(tmp_path):
    stop_in(tmp_path / "s.zarr", tmp_path, [40, 40, 40], part=2, row=30)  # rows 0 … 95 are in files
    seen = []
    create(tmp_path / "s.zarr", parts_of([40, 40, 40], tmp_path, lambda *at: seen.append(at)))
    assert {part for part, _ in seen} == {2}


def test_record_is_written_for_few_files_and_a_stop_loses_few(tmp_path, monkeypatch):
    monkeypatch.setattr(build_index, "RECORDS", 4)
    written = []
    write = index.IndexRecord.write
    monkeypatch.setattr(index.IndexRecord, "write", lambda self, folder: (written.append(1), write(self, folder)))
    stop_in(tmp_path / "s.zarr", tmp_path, [1_290], part=0, row=1_289)  # the last row of file 41
    assert len(written) < 20
    assert len(index.IndexRecord.read(tmp_path / "s.zarr/index").digests) >= 40 * 3 // 4


@pytest.mark.parametrize("change", ["manifest", "captions", "file", "parts"])
def test_other_index_starts_over(tmp_path, change):
    stop_in(tmp_path / "s.zarr", tmp_path, [40, 40], part=1, row=39)
    parts = parts_of([30, 40], tmp_path)
    changes = {}
    if change == "manifest":
        changes = {"manifest": {"name": "other"}}
    elif change == "captions":
        changes = {"captions": ["raw", "long"]}
    elif change == "file":
        (tmp_path / "0.tar").write_text("changed")
    else:
        parts = [Part(f"other {part.name}", part.read) for part in parts]
    keys = [sample.key for sample in create(tmp_path / "s.zarr", parts, **changes).samples(0, 70)]
    assert keys == [f"0/{i}" for i in range(30)] + [f"1/{i}" for i in range(40)]


def test_reads_rows_across_files_and_groups(tmp_path):
    made = create(tmp_path / "s.zarr", parts_of([100], tmp_path))
    for start, stop in [(0, 1), (7, 9), (31, 33), (5, 97), (64, 100), (99, 100)]:
        assert made.index(["key"], start, stop)["key"].to_pylist() == [f"0/{i}" for i in range(start, stop)]
    assert [s.captions for s in made.samples(31, 33)] == [{"raw": "words 0 31"}, {"raw": "words 0 32"}]
    assert [s.captions for s in made.samples(31, 33, captions=[])] == [{}, {}]


@pytest.mark.parametrize("hashes", ["own", "all the same", "in parts"])
def test_duplicate_keys_despite_colliding_hashes(tmp_path, monkeypatch, hashes):
    if hashes == "in parts":
        monkeypatch.setattr(build_index, "HASHES", 30)
    if hashes == "all the same":
        monkeypatch.setattr("sail_align.extract.store.index.hash", lambda _: 7, raising=False)
    create(tmp_path / "good.zarr", parts_of([40, 40], tmp_path))
    twice = [*parts_of([40, 40], tmp_path), Part.of([Sample("z", ""), Sample("1/7", "")])]
    with pytest.raises(UserError, match="'1/7' occurs more than once"):
        create(tmp_path / "bad.zarr", twice)


@pytest.mark.slow
def test_killed_index_resumes_byte_identically(pictures, start_warm):
    open_pictures(pictures, "whole.zarr")
    for point in (3, 6, 21, 40):
        process = start_warm(open_and_die, pictures, "killed.zarr", point, output=pictures / "output.txt")
        assert process.wait() == -signal.SIGKILL, process.output
    assert not (pictures / "killed.zarr" / "zarr.json").exists()
    open_pictures(pictures, "killed.zarr")
    assert contents(pictures / "killed.zarr") == contents(pictures / "whole.zarr")


@pytest.fixture
def tables(pictures):
    """The pictures' table split into three of 250, 0 and 350 rows."""
    header, *rows = (pictures / "captions.csv").read_text().splitlines(keepends=True)
    for name, of_table in {"a": rows[:250], "b": [], "c": rows[250:]}.items():
        (pictures / f"{name}-captions.csv").write_text(header + "".join(of_table))
    (pictures / "captions.csv").unlink()
    manifest = pictures / "pictures.yaml"
    manifest.write_text(manifest.read_text().replace("files: captions.csv", "files: '*-captions.csv'"))
    open_pictures(pictures, "s.zarr")
    return pictures


def parts_read(monkeypatch) -> list[str]:
    """Return a list that collects the names of the parts compared from here on."""
    read = []
    compare = _SourceCheck.compare

    def spy(self, part, *arguments):
        read.append(part.name)
        return compare(self, part, *arguments)

    monkeypatch.setattr(_SourceCheck, "compare", spy)
    return read


@pytest.mark.slow
def test_unchanged_files_are_not_read_again(tables, monkeypatch):
    read = parts_read(monkeypatch)
    open_pictures(tables, "s.zarr")
    assert read == []


@pytest.mark.slow
def test_touched_file_is_read_once(tables, monkeypatch):
    read = parts_read(monkeypatch)
    os.utime(tables / "c-captions.csv", ns=(1, 1))
    before = contents(tables / "s.zarr")
    open_pictures(tables, "s.zarr")
    open_pictures(tables, "s.zarr")
    assert [Path(name).name for name in read] == ["c-captions.csv"]
    after = contents(tables / "s.zarr")
    assert {name for name in after if after[name] != before[name]} == {"index/sources.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (
            "c",
            lambda text: text.replace("picture 300,", "another picture,"),
            r"row 300, but \S+/c-cap\S+ now has sa",
        ),
        (
            "a",
            lambda text: text[: text.index("249.png")],
            r"'249.png' in row 249, but \S+/a-captions.csv now has no sample",
        ),
        (
            "c",
            lambda text: text[: text.index("599.png")],
            r"'599.png' in row 599, but \S+/c-captions.csv now has no sample",
        ),
        (
            "a",
            lambda text: text + "x.png,one more,,0\n",
            r"'250.png' in row 250, but \S+/a-captions.csv now has .*'x.png'",
        ),
        (
            "b",
            lambda text: text + "x.png,one more,,0\n",
            r"'250.png' in row 250, but \S+/b-captions.csv now has .*'x.png'",
        ),
        (
            "c",
            lambda text: text + "x.png,one more,,0\n",
            r"no sample in row 600, but \S+/c-captions.csv now has .*'x.png'",
        ),
        (
            "d",
            lambda text: "image,caption,story\nx.png,,\n",
            r"no sample in row 600, but \S+/d-captions.csv now has .*'x.p",
        ),
    ],
)
def test_changed_source_names_file_and_first_row(tables, table, change, message):
    file = tables / f"{table}-captions.csv"
    file.write_text(change(file.read_text() if file.exists() else ""))
    with pytest.raises(UserError, match=message):
        open_pictures(tables, "s.zarr")


@pytest.mark.slow
def test_rejects_missing_table_and_compares_all_without_record(tables, monkeypatch):
    read = parts_read(monkeypatch)
    (tables / "s.zarr/index/sources.json").unlink()
    open_pictures(tables, "s.zarr")
    assert len(read) == 3
    open_pictures(tables, "s.zarr")
    assert len(read) == 3
    (tables / "c-captions.csv").unlink()
    with pytest.raises(UserError, match=r"'250.png' in row 250, but the data set now has no sample"):
        open_pictures(tables, "s.zarr")
