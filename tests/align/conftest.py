"""Real stores, small, of images and captions that share a few factors."""

from pathlib import Path

import numpy as np
import pytest
from fakes import identity

from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.store.store import Store

IMAGE_DIM, TEXT_DIM = 12, 8


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Skip waiting for the disk, which takes most of the time. Power cuts are not under test."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def make_store(tmp_path):
    """Makes a store of `rows` pairs under a name.

    A row in `bad` has no image; `captions` maps names to the rows that lack them. Where the rows are `numbered`,
    feature 0 of row i is `first + i` for the image and for every caption.
    """

    def make(
        name="photos",
        rows=300,
        captions=None,
        *,
        bad=(),
        first=0,
        numbered=False,
        commit=True,
        image=None,
        text=None,
        shard_rows=64,
        chunk_rows=16,
    ) -> Path:
        captions = {"raw": ()} if captions is None else captions
        store = Store.create(
            tmp_path / "features" / f"{name}.zarr",
            dataset=name,
            manifest={},
            parts=[
                Part.of([Sample(f"key {first + i}", f"{i}.jpg", dict.fromkeys(captions, "…")) for i in range(rows)])
            ],
            captions=list(captions),
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
        )
        random = np.random.default_rng(0)
        world = {dim: random.normal(size=(4, dim)) for dim in (IMAGE_DIM, TEXT_DIM)}
        factors = np.random.default_rng(first).normal(size=(rows, 4))

        def fill(array, missing, seed):
            noise = np.random.default_rng([first, seed]).normal(size=(rows, array.dim))
            features = (2 * factors @ world[array.dim] + noise).astype(np.float16)
            if numbered:
                features[:, 0] = first + np.arange(rows)
            status = np.zeros(rows, dtype=np.uint8)
            features[list(missing)], status[list(missing)] = np.nan, Status.MISSING
            for shard in array.shards if commit else array.shards[:-1]:
                span = slice(*array.span(shard))
                array.write(shard, features[span], status[span])

        fill(store.add(image or identity("image", dim=IMAGE_DIM)), bad, 0)
        for number, (caption, missing) in enumerate(captions.items(), start=1):
            fill(store.add(text or identity("text", dim=TEXT_DIM), caption), missing, number)
        return store.path

    return make


@pytest.fixture
def poison():
    """Writes values that are no numbers into rows of a store's images that stay ok, as a broken tool could."""

    def spoil(path, rows=slice(None, None, 7)):
        array = Store.open(path).image()
        features, status = array.read()
        features[rows, 0] = np.nan
        for shard in array.shards:
            span = slice(*array.span(shard))
            array.write(shard, features[span], status[span])

    return spoil
