"""Every usable row once an epoch, in an order that is a function of seed and batch number alone."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.align.data import open_pairs, split_held_out
from sail_align.align.stream import Stream


@pytest.fixture
def make_numbered(make_store):
    return partial(make_store, numbered=True)


def stream_of(paths, batch_size=10, seed=0, buffer_rows=64, rows=None):
    pairs = open_pairs(paths)
    return Stream(
        pairs, rows or [each.usable() for each in pairs], batch_size=batch_size, seed=seed, buffer_rows=buffer_rows
    )


def epoch(stream, number=0):
    start = number * stream.batches_per_epoch
    return list(itertools.islice(stream.batches(start), stream.batches_per_epoch))


def numbers(batches):
    return [int(row) for batch in batches for row in batch.images[:, 0]]


def test_every_row_is_served_once_an_epoch_and_captions_stay_with_their_image(make_numbered):
    stream = stream_of([make_numbered(rows=300, captions={"raw": (), "long": ()})])
    batches = epoch(stream)
    assert sorted(numbers(batches)) == list(range(300))
    for batch in batches:
        assert batch.images.shape == (10, 12)
        assert batch.texts.shape == (2, 10, 8)
        assert batch.images.dtype == batch.texts.dtype == torch.float16
        for caption in batch.texts:
            assert torch.equal(caption[:, 0], batch.images[:, 0])


def test_a_row_that_lacks_its_image_or_a_caption_is_never_served(make_numbered):
    path = make_numbered(rows=100, bad=[3, 50], captions={"raw": [7], "long": [50, 99]})
    stream = stream_of([path], batch_size=8)
    assert stream.rows == 96
    batches = epoch(stream)
    assert sorted(numbers(batches)) == sorted(set(range(100)) - {3, 50, 7, 99})
    assert all(batch.images.isfinite().all() and batch.texts.isfinite().all() for batch in batches)


def test_the_rest_of_an_epoch_is_dropped_and_differs_between_epochs(make_numbered):
    stream = stream_of([make_numbered(rows=105)])
    served = [set(numbers(epoch(stream, number))) for number in range(2)]
    assert [len(rows) for rows in served] == [100, 100]
    assert served[0] != served[1]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 30), batch_size=st.integers(2, 70), buffer_rows=st.sampled_from([16, 50, 400]))
def test_a_stream_started_at_any_batch_goes_on_as_one_that_was_not_stopped(
    pair_of_stores, start, batch_size, buffer_rows
):
    whole, resumed = (stream_of(pair_of_stores, batch_size, 1, buffer_rows) for _ in range(2))
    expected = itertools.islice(whole.batches(), start, start + 5)
    for ours, theirs in zip(itertools.islice(resumed.batches(start), 5), expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.texts, theirs.texts)


@pytest.fixture
def pair_of_stores(make_numbered):
    return [make_numbered("one", rows=150), make_numbered("two", rows=70, first=1000, shard_rows=32, chunk_rows=8)]


def test_two_stores_are_mixed(pair_of_stores):
    stream = stream_of(pair_of_stores, batch_size=22, buffer_rows=96)
    batches = epoch(stream)
    assert sorted(numbers(batches)) == [*range(150), *range(1000, 1070)]
    for batch in batches[:-1]:
        from_second = (batch.images[:, 0] >= 1000).sum()
        assert 0 < from_second < 22


def test_seeds_and_epochs_give_other_orders(make_numbered):
    path = make_numbered(rows=100)
    orders = [numbers(epoch(stream_of([path], seed=seed), number)) for seed in (0, 1) for number in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert numbers(epoch(stream_of([path]))) == orders[0]


def test_no_more_than_the_buffer_is_read_ahead(make_numbered, monkeypatch):
    stream = stream_of([make_numbered(rows=320)], batch_size=10, buffer_rows=64)
    read = []
    original = Stream._read
    monkeypatch.setattr(Stream, "_read", lambda self, chunks: read.append(len(chunks)) or original(self, chunks))
    for _ in itertools.islice(stream.batches(), 7):
        pass
    assert read == [4, 4]


def test_a_store_that_fits_the_buffer_is_read_once(make_numbered, monkeypatch):
    stream = stream_of([make_numbered(rows=100)], buffer_rows=1_000)
    read = []
    original = Stream._read
    monkeypatch.setattr(Stream, "_read", lambda self, chunks: read.append(len(chunks)) or original(self, chunks))
    for _ in itertools.islice(stream.batches(), 35):
        pass
    assert len(read) == 1


def test_blocks_are_every_row_once_in_order(pair_of_stores):
    assert numbers(stream_of(pair_of_stores).blocks()) == [*range(150), *range(1000, 1070)]


def test_held_out_rows_depend_on_their_keys_alone(make_store):
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


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [(300, 0.0, 0), (300, 0.01, 60), (900, 0.05, 100), (900, 0.2, 180), (4, 0.05, 0), (8_000, 0.45, 3_600)],
)
def test_the_number_of_held_out_rows_is_bounded(make_store, rows, fraction, expected):
    pairs = open_pairs([make_store(rows=rows, shard_rows=4_096, chunk_rows=1_024)])
    (held,) = split_held_out(pairs, [pairs[0].usable()], fraction)
    assert held.sum() == expected


def test_a_batch_that_cannot_be_filled_is_refused(make_store):
    with pytest.raises(ValueError, match="9 rows do not fill a batch of 10"):
        stream_of([make_store(rows=100)], rows=[np.arange(100) < 9])
