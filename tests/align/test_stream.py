"""The stream serves each usable row once per epoch, in an order that depends only on seed and batch number."""

import itertools
import json
import shutil
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.align.data.loader import PREFETCH, Batch, Stream
from sail_align.align.data.pairs import open_pairs, split_held_out
from sail_align.align.data.sampler import StreamState
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.hierarchy import read_document, read_root, write_root


@pytest.fixture
def make_numbered(make_store):
    return partial(make_store, numbered=True)


def stream_of(paths, batch_size=10, seed=0, buffer_rows=64, rows=None, **ranks):
    pairs = open_pairs(paths)
    rows = rows or [each.usable() for each in pairs]
    return Stream(pairs, rows, batch_size=batch_size, seed=seed, buffer_rows=buffer_rows, **ranks)


def served(stream, state, count):
    """Return copies of `count` batches from a state on (a stream reuses its buffers), and close the stream."""
    with stream:
        batches = itertools.islice(stream.batches(state), count)
        return [Batch(batch.images.clone(), batch.texts.clone()) for batch, _ in batches]


def epoch(stream, number=0):
    return served(stream, StreamState(number, 0), stream.batches_per_epoch)


def numbers(batches):
    return [int(row) for batch in batches for row in batch.images[:, 0]]


def test_epoch_serves_each_row_once_with_its_captions(make_numbered):
    stream = stream_of([make_numbered(rows=300, captions={"raw": (), "long": ()})])
    batches = epoch(stream)
    assert sorted(numbers(batches)) == list(range(300))
    for batch in batches:
        assert batch.images.shape == (10, 12)
        assert batch.texts.shape == (2, 10, 8)
        assert batch.images.dtype == batch.texts.dtype == torch.float16
        for caption in batch.texts:
            assert torch.equal(caption[:, 0], batch.images[:, 0])


def test_rows_without_image_or_caption_are_never_served(make_numbered):
    path = make_numbered(rows=100, bad=[3, 50], captions={"raw": [7], "long": [50, 99]})
    stream = stream_of([path], batch_size=8)
    assert stream.rows == 96
    batches = epoch(stream)
    assert sorted(numbers(batches)) == sorted(set(range(100)) - {3, 50, 7, 99})
    assert all(batch.images.isfinite().all() and batch.texts.isfinite().all() for batch in batches)


def test_rows_dropped_at_the_end_differ_by_epoch(make_numbered):
    path = make_numbered(rows=105)
    served = [set(numbers(epoch(stream_of([path]), number))) for number in range(2)]
    assert [len(rows) for rows in served] == [100, 100]
    assert served[0] != served[1]


@pytest.fixture
def pair_of_stores(make_numbered):
    return [make_numbered("one", rows=150), make_numbered("two", rows=70, first=1000, shard_rows=32, chunk_rows=8)]


def test_batches_mix_two_stores(pair_of_stores):
    stream = stream_of(pair_of_stores, batch_size=22, buffer_rows=96)
    batches = epoch(stream)
    assert sorted(numbers(batches)) == [*range(150), *range(1000, 1070)]
    for batch in batches[:-1]:
        from_second = (batch.images[:, 0] >= 1000).sum()
        assert 0 < from_second < 22


def test_batches_depend_on_seed_and_epoch(make_numbered):
    path = make_numbered(rows=100)
    orders = [numbers(epoch(stream_of([path], seed=seed), number)) for seed in (0, 1) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert numbers(epoch(stream_of([path]))) == orders[0]


def test_rows_of_a_batch_are_in_disk_order(pair_of_stores):
    for batch in epoch(stream_of(pair_of_stores, batch_size=40)):
        assert numbers([batch]) == sorted(numbers([batch]))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    density=st.sampled_from([0.02, 0.5, 1.0]),
    buffer_rows=st.sampled_from([1, 40, 999]),
    part=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_choice_of_rows_is_served_once_per_epoch(pair_of_stores, density, buffer_rows, part, seed):
    random = np.random.default_rng(seed)
    rows = [random.random(size) < density for size in (150, 70)]
    rows[1][random.integers(70)] = True
    wanted = {*np.flatnonzero(rows[0]), *(1000 + np.flatnonzero(rows[1]))}
    batch_size = max(1, round(part * len(wanted)))
    got = numbers(epoch(stream_of(pair_of_stores, batch_size, seed, buffer_rows, rows), number=1))
    assert len(got) == len(wanted) // batch_size * batch_size
    assert len(set(got)) == len(got)
    assert set(got) <= wanted


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 30), batch_size=st.integers(4, 70), buffer_rows=st.sampled_from([16, 50, 400]))
def test_stream_resumes_from_any_state_with_any_number_of_ranks(pair_of_stores, start, batch_size, buffer_rows):
    stream = partial(stream_of, pair_of_stores, batch_size, 1, buffer_rows)
    with stream() as whole:
        states = [StreamState(), *(state for _, state in itertools.islice(whole.batches(), start + 4))]
        assert states == [StreamState(*divmod(number, whole.batches_per_epoch)) for number in range(start + 5)]
    expected = served(stream(), None, start + 4)[start:]
    state = StreamState(*json.loads(json.dumps(states[start])))
    for world in (1, 2, 3):
        parts = [served(stream(rank=rank, world=world), state, 4) for rank in range(world)]
        for *of_ranks, batch in zip(*parts, expected, strict=True):
            assert torch.equal(torch.cat([part.images for part in of_ranks]), batch.images)
            assert torch.equal(torch.cat([part.texts for part in of_ranks], dim=1), batch.texts)
            sizes = [len(part.images) for part in of_ranks]
            assert max(sizes) - min(sizes) <= 1


def test_batch_stays_valid_until_the_next_but_one(make_numbered):
    path = make_numbered(rows=100)
    expected = epoch(stream_of([path]))
    with stream_of([path]) as stream:
        batches = stream.batches()
        held = [next(batches)[0], next(batches)[0]]
        for before, latest in pairwise(expected):
            assert torch.equal(held[0].images, before.images)
            assert torch.equal(held[1].images, latest.images)
            held = [held[1], next(batches)[0]]
        assert len({batch.images.data_ptr() for batch, _ in itertools.islice(stream.batches(), 9)}) == PREFETCH + 1


def test_stream_counts_bytes_and_waiting_time(make_numbered):
    stream = stream_of([make_numbered(rows=100)])
    epoch(stream)
    assert stream.bytes_read == 100 * (12 + 8) * 2
    assert stream.wait_seconds > 0


def compress(path):
    """Rewrite the features of a store as compressed shards."""
    for features in [array.parent for array in path.glob("*/**/features/zarr.json")]:
        values = zarr.open_array(features, mode="r")
        kept = values[:], values.shards, values.chunks
        shutil.rmtree(features)
        zarr.create_array(features, data=kept[0], shards=kept[1], chunks=kept[2], fill_value=np.nan)
    attributes = read_root(path)
    write_root(path, attributes, {node: read_document(path / node) for node in attributes["metadata_sha256"]})


@pytest.mark.slow
@pytest.mark.parametrize("zarrs", [True, False])
def test_compressed_stores_give_the_same_batches_and_decode_each_chunk_once(pair_of_stores, monkeypatch, zarrs):
    if zarrs:
        pytest.importorskip("zarrs")
    else:
        monkeypatch.setattr("sail_align.extract.store.sharded.find_spec", lambda _: None)
    mapped = epoch(stream_of(pair_of_stores), 2)
    for path in pair_of_stores:
        compress(path)
    stream = stream_of(pair_of_stores)
    pipeline = stream.pairs[0].image._features.zarr._async_array.codec_pipeline
    assert type(pipeline).__name__ == ("ZarrsCodecPipeline" if zarrs else "BatchedCodecPipeline")
    read, most = [], 0
    original = FeatureArray.chunk
    monkeypatch.setattr(FeatureArray, "chunk", lambda self, number: read.append(number) or original(self, number))
    with stream:
        for (batch, _), expected in zip(stream.batches(StreamState(2, 0)), mapped, strict=False):
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.texts, expected.texts)
            most = max(most, len(stream._decoded))
    chunks = sum(len(each.chunks()) for each in open_pairs(pair_of_stores))
    assert len(read) <= 2 * (chunks + 9)  # images and a caption, and the first buffer of the next epoch
    assert most <= 2 * 2 * (64 // 8 + 1)


def test_damaged_shard_ends_the_stream(make_store):
    path = make_store()
    (shard,) = path.glob("image/*/features/c/1/0")
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="1/0 is damaged: the index at its end does not match its checksum"):
        epoch(stream_of([path]))


def test_failed_look_ahead_ends_the_stream(make_numbered, monkeypatch):
    monkeypatch.setattr("sail_align.align.data.sampler.Order.in_next_buffer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        epoch(stream_of([make_numbered(rows=100)]))


def test_batches_request_chunks_again_after_a_scan(make_numbered, monkeypatch):
    asked = []
    monkeypatch.setattr(FeatureArray, "prefetch", lambda self, chunks: asked.extend(chunks))
    with stream_of([make_numbered(rows=100)], batch_size=100) as stream:
        list(stream.scan())
        asked.clear()
        next(stream.batches())
        assert {*range(7)} <= {*asked}


def test_scan_yields_each_row_once_in_order(pair_of_stores):
    assert numbers(stream_of(pair_of_stores).scan()) == [*range(150), *range(1000, 1070)]


@pytest.mark.slow
def test_held_out_rows_depend_only_on_keys(make_store):
    stores = [make_store("one", rows=900), make_store("two", rows=400, first=1000)]

    def held_keys(paths):
        pairs = open_pairs(paths)
        rows = split_held_out(pairs, [each.usable() for each in pairs], 0.1)
        return {
            key.as_py()
            for each, held in zip(pairs, rows, strict=True)
            for key in each.store.index(["key"])["key"].filter(held)
        }

    together = held_keys(stores)
    assert len(together) == 130
    assert held_keys(stores[::-1]) == together


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [(300, 0.0, 0), (300, 0.01, 60), (900, 0.05, 100), (900, 0.2, 180), (4, 0.05, 0), (8_000, 0.45, 3_600)],
)
def test_number_of_held_out_rows_is_bounded(make_store, rows, fraction, expected):
    pairs = open_pairs([make_store(rows=rows, shard_rows=4_096, chunk_rows=1_024)])
    (held,) = split_held_out(pairs, [pairs[0].usable()], fraction)
    assert held.sum() == expected


def test_stream_rejects_fewer_rows_than_a_batch(make_store):
    with pytest.raises(ValueError, match="9 rows do not fill a batch of 10"):
        stream_of([make_store(rows=100)], rows=[np.arange(100) < 9])
