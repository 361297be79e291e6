"""The corruption table: every file of a store × every damage, and what reading and `verify` say.

Reading must never return other values than were written: it refuses, or a shard is absent. `verify` must find the
damage, but in the files that docs/guarantees.md lists.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import identity

from sail_align.extract.data import CaptionTables, Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store.store import Store

pytestmark = pytest.mark.slow

ROWS = 40
GUARANTEES = Path(__file__).parents[2] / "docs/guarantees.md"

FILES = [
    "zarr.json",
    "index/part-00000.parquet",
    "index/sources.json",
    "index/recaptions.json",
    "image/zarr.json",
    "image/fake-image/zarr.json",
    "image/fake-image/features/zarr.json",
    "image/fake-image/features/c/0/0",
    "image/fake-image/features/c/1/0",
    "image/fake-image/status/zarr.json",
    "image/fake-image/status/c/0",
    "image/fake-image/status/c/1",
    "text/fake-text/zarr.json",
    "text/fake-text/raw/zarr.json",
    "text/fake-text/raw/features/zarr.json",
    "text/fake-text/long/features/c/0/0",
    "text/fake-text/long/status/c/0",
    "commits/image/fake-image/00000.json",
    "commits/text/fake-text/long/00001.json",
]
SILENT = {"index/sources.json"}
"""Files in which `verify` finds no damage: nothing that a store returns depends on them."""


def make(folder: Path, seed: int) -> Path:
    """Write a store of two shards per array, with captions of its own and joined ones. One row has no image."""
    folder.mkdir(exist_ok=True)
    table = folder / "long.csv"
    table.write_text("key,text\n" + "".join(f"{seed}-{n},a long text {n} of {seed}\n" for n in range(ROWS)))
    store = Store.create(
        folder / "s.zarr",
        dataset="set",
        manifest={"name": "set"},
        parts=[Part.of([Sample(f"{seed}-{n}", f"{n}.jpg", {"raw": f"text {n}"}) for n in range(ROWS)])],
        captions=["raw"],
        recaptions=CaptionTables((table,), "key", "key", {"long": "text"}),
        shard_rows=32,
        chunk_rows=8,
        quiet=True,
    )
    random = np.random.default_rng(seed)
    for array in (store.add(identity("image")), *(store.add(identity("text"), name) for name in ("raw", "long"))):
        features, status = random.normal(size=(ROWS, 4)).astype(np.float16), np.zeros(ROWS, np.uint8)
        features[3], status[3] = np.nan, Status.MISSING
        for shard in array.shards:
            rows = slice(*array.span(shard))
            array.write(shard, features[rows], status[rows])
    store.tidy()
    return store.path


def flip(at: float) -> Callable[[Path, Path], object]:
    def damage(file: Path, _other: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


def edit(file: Path, _other: Path) -> None:
    """Change the first number or text in a JSON file, and in others the byte after the first 20."""
    if file.suffix != ".json":
        flip(20 / len(file.read_bytes()))(file, file)
        return

    def change(value):
        if isinstance(value, dict) and value:
            name = min(value, key=lambda each: (each in ("zarr_format", "format", "node_type"), each))
            return {**value, name: change(value[name])}
        if isinstance(value, list) and value:
            return [change(value[0]), *value[1:]]
        return value + 1 if isinstance(value, int) else f"{value}?"

    file.write_text(json.dumps(change(json.loads(file.read_bytes()))))


def replace_by_folder(file: Path, _other: Path) -> None:
    file.unlink()
    file.mkdir()


def exchange(file: Path, _other: Path) -> None:
    """Exchange a file with its counterpart in another shard, array or part of the store."""
    name = str(file)
    for one, two in (
        *(("/c/0", "/c/1"), ("/c/1", "/c/0"), ("00000.json", "00001.json"), ("00001.json", "00000.json")),
        *(("raw/", "long/"), ("features/zarr", "status/zarr"), ("status/zarr", "features/zarr")),
        *(("image/fake-image/", "text/fake-text/"), ("text/fake-text/", "image/fake-image/")),
        *(("sources.json", "recaptions.json"), ("recaptions.json", "sources.json"), ("image/zarr", "text/zarr")),
        *(("part-00000.parquet", "sources.json"), ("s.zarr/zarr.json", "s.zarr/image/zarr.json")),
    ):
        if one in name:
            counterpart = Path(name.replace(one, two))
            content = file.read_bytes()
            file.write_bytes(counterpart.read_bytes())
            counterpart.write_bytes(content)
            return
    raise AssertionError(name)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "lost": lambda file, _: file.unlink(),
    "empty": lambda file, _: file.write_bytes(b""),
    "cut to half": lambda file, _: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "last byte cut": lambda file, _: file.write_bytes(file.read_bytes()[:-1]),
    "zeros": lambda file, _: file.write_bytes(bytes(file.stat().st_size)),
    "longer": lambda file, _: file.write_bytes(file.read_bytes() + b"x"),
    **{f"bit at {at:.0%}": flip(at) for at in (0, 0.1, 0.35, 0.5, 0.75, 0.97, 1)},
    "edited": edit,
    "exchanged": exchange,
    "of another store": lambda file, other: file.write_bytes(other.read_bytes()),
    "folder": replace_by_folder,
}


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def read(path: Path) -> dict[str, object] | None:
    """Return everything that a store returns, None if it refuses."""
    try:
        store = Store.open(path)
        found: dict[str, object] = {
            "attributes": [store.dataset, store.rows, store.captions, store.attributes["manifest"]],
            "index": store.index().to_pylist(),
            "joined": list(joined.lines()) if (joined := store.recaptions()) else [],
        }
        for array in store.arrays():
            features, status = array.read()
            found[array.path] = [
                (shard, features[slice(*array.span(shard))].tobytes(), status[slice(*array.span(shard))].tobytes())
                for shard in array.markers
            ]
    except UserError:
        return None
    return found


def says(path: Path) -> bool:
    """Return whether `verify` finds damage, or shards that are not committed."""
    try:
        return any(is_damage or "not written yet" in text for text, is_damage in verify_store(path))
    except UserError:
        return True


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    one, two = make(folder / "one", 1), make(folder / "two", 2)
    assert not says(one)
    return one, two, read(one)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_never_read_as_data(pair, tmp_path, name, damage):
    one, two, written = pair
    path = shutil.copytree(one, tmp_path / "s.zarr")
    DAMAGES[damage](path / name, two / name)
    found = read(path)
    if contents(path) == contents(one):
        assert damage in ("exchanged", "of another store")  # the metadata of equal arrays are equal
        return
    if found is not None:
        assert found.keys() == written.keys()
        for what, values in found.items():
            if "/" in what:
                assert set(values) <= set(written[what])  # shards may be absent
            else:
                assert values == written[what]
    assert says(path) or name in SILENT


def test_documents_list_the_files_in_which_damage_is_not_found():
    text = GUARANTEES.read_text()
    for name in SILENT:
        assert f"`{name}`" in text
