"""The life of a store, as a state machine: written, killed, damaged, discarded, restored, extended, read.

In every case, a reader sees exactly the shards that were committed and not damaged or discarded since.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fakes import identity
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store import features, hierarchy, markers
from sail_align.extract.store.store import Store

ROWS, SHARD, CHUNK = 20, 8, 4
CAPTIONS = ("raw", "long")
ARRAYS = {"image/fake-image": "", **{f"text/fake-text/{name}": name for name in CAPTIONS}}
SHARDS = range(3)

arrays, shards = st.sampled_from(list(ARRAYS)), st.sampled_from(SHARDS)


class Killed(BaseException):
    """Stands for SIGKILL at a write."""


class StoreLife(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "s.zarr"
        self.random = np.random.default_rng(0)
        self.committed: dict[tuple[str, int], tuple[bytes, bytes]] = {}
        self.damaged: dict[Path, bytes] = {}

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize()
    def create(self):
        samples = [Sample(f"key {n}", f"{n}.jpg", dict.fromkeys(CAPTIONS, f"text {n}")) for n in range(ROWS)]
        sizes = {"shard_rows": SHARD, "chunk_rows": CHUNK}
        Store.create(
            self.path, dataset="set", manifest={}, parts=[Part.of(samples)], captions=CAPTIONS, quiet=True, **sizes
        )

    def opened(self, path):
        """Open an array of the store in a new process, as it were, and create it if it is missing."""
        kind = path.split("/")[0]
        return Store.open(self.path).add(identity(kind), ARRAYS[path])

    def new_rows(self, array, shard):
        start, stop = array.span(shard)
        values = self.random.normal(size=(stop - start, array.dim)).astype(np.float16)
        status = self.random.choice([Status.OK, Status.OK, Status.MISSING], stop - start).astype(np.uint8)
        values[status != Status.OK] = np.nan
        return values, status

    def files(self, path, shard):
        """Return the files of a committed shard: features, statuses, marker."""
        array = self.path / path
        marker = self.path / "commits" / path / f"{shard:05d}.json"
        return [array / f"features/c/{shard}/0", array / f"status/c/{shard}", marker]

    def forget_damage(self, files):
        for file in files:
            self.damaged.pop(file, None)

    @precondition(lambda self: not self.damaged)
    @rule(path=arrays, shard=shards)
    def write(self, path, shard):
        array = self.opened(path)
        values, status = self.new_rows(array, shard)
        array.write(shard, values, status)
        self.committed[path, shard] = values.tobytes(), status.tobytes()

    @precondition(lambda self: not self.damaged)
    @rule(path=arrays, shard=shards, writes=st.integers(0, 7))
    def write_and_be_killed(self, path, shard, writes):
        """Be killed before one of the files is written, of a new array or of a shard."""
        left, original = writes, features.write_atomically

        def write_or_die(file, content, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            original(file, content, **options)

        with pytest.MonkeyPatch.context() as patch:
            for module in (features, hierarchy, markers):
                patch.setattr(module, "write_atomically", write_or_die)
            try:
                array = self.opened(path)
                values, status = self.new_rows(array, shard)
                self.committed.pop((path, shard), None)  # its marker is removed before the first file is written
                array.write(shard, values, status)
                self.committed[path, shard] = values.tobytes(), status.tobytes()
            except Killed:
                pass

    @precondition(lambda self: self.committed and not self.damaged)
    @rule(data=st.data())
    def damage(self, data):
        path, shard = data.draw(st.sampled_from(sorted(self.committed)))
        file = data.draw(st.sampled_from(self.files(path, shard)))
        if not file.exists():  # all rows are fill values
            return
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        self.damaged[file] = file.read_bytes()
        file.write_bytes(content)

    @precondition(lambda self: self.damaged)
    @rule()
    def undo_damage(self):
        for file, content in self.damaged.items():
            file.write_bytes(content)
        self.damaged.clear()

    @precondition(lambda self: self.damaged)
    @rule()
    def discard_damage(self):
        assert [text for text, is_damage in verify_store(self.path, discard=True) if is_damage]
        for path, shard in list(self.committed):
            if not set(self.damaged).isdisjoint(self.files(path, shard)):
                del self.committed[path, shard]
        self.damaged.clear()

    @precondition(lambda self: not self.damaged)
    @rule(path=arrays, name=st.sampled_from(["features", "status", ""]), lost=st.booleans())
    def lose_and_restore_metadata(self, path, name, lost):
        file = self.path / path / name / "zarr.json"
        if path not in Store.open(self.path).array_paths():
            return
        before = file.read_bytes()
        if lost:
            file.unlink()
        else:
            file.write_bytes(before.replace(b"zarr_format", b"zarr-format"))
        with pytest.raises(UserError, match=r"zarr\.json is (missing or )?damaged"):
            Store.open(self.path).array(path)
        Store.open(self.path).restore()
        assert file.read_bytes() == before

    @invariant()
    def readers_see_what_was_committed(self):
        if not self.path.exists():
            return
        store = Store.open(self.path)
        found = {}
        for array in store.arrays():
            for shard in array.markers:
                try:
                    values, status = array.read(*array.span(shard))
                except UserError:
                    assert not set(self.damaged).isdisjoint(self.files(array.path, shard))
                else:
                    found[array.path, shard] = values.tobytes(), status.tobytes()
        for place, values in found.items():
            assert self.committed[place] == values
        missing = self.committed.keys() - found.keys()
        assert all(not set(self.damaged).isdisjoint(self.files(*place)) for place in missing)

    @precondition(lambda self: not self.damaged)
    @rule()
    def verify(self):
        assert not [text for text, is_damage in verify_store(self.path) if is_damage]
        Store.open(self.path).tidy()
        assert not list(self.path.rglob("*.tmp"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.slow
class TestStoreLife(StoreLife.TestCase):
    settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
