"""Copying rows out of chunks: the C loop and NumPy give the same result."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.align.data import loader as module
from sail_align.align.data.loader import take_rows

needs_c = pytest.mark.skipif(module.gather is None, reason="installed without a C compiler")


@pytest.fixture(params=[pytest.param("c", marks=needs_c), "numpy"])
def implementation(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(module, "gather", None)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    dim=st.sampled_from([1, 3, 31, 32, 64, 96, 1000]),
    rows=st.integers(0, 90),
    shift=st.integers(0, 3),
    rising=st.booleans(),
    seed=st.integers(0, 99),
)
def test_take_rows_copies_each_row_from_its_chunk(implementation, counts, dim, rows, shift, rising, seed):
    random = np.random.default_rng(seed)
    chunks = [random.standard_normal((count, dim)).astype(np.float16) for count in counts]
    of = random.integers(len(chunks), size=rows)
    if rising:
        of.sort()
    within = random.integers(np.array(counts)[of]) if rows else of
    memory = np.zeros(rows * dim + 8, np.float16)
    out = memory[shift : shift + rows * dim].reshape(rows, dim)
    take_rows(chunks, of, within, out)
    assert out.tolist() == [chunks[chunk][row].tolist() for chunk, row in zip(of, within, strict=True)]
    assert not memory[:shift].any()
    assert not memory[shift + rows * dim :].any()


@pytest.mark.parametrize(("of", "row"), [(0, 4), (1, 3), (2, 0)])
def test_take_rows_rejects_a_row_outside_its_chunk(implementation, of, row):
    chunks, out = [np.ones((4, 32), np.float16), np.ones((3, 32), np.float16)], np.zeros((2, 32), np.float16)
    with pytest.raises(IndexError):
        take_rows(chunks, np.array([0, of]), np.array([0, row]), out)


def test_take_rows_accepts_non_contiguous_views(implementation):
    chunk = np.arange(60, dtype=np.float16).reshape(5, 12)
    out = np.zeros((2, 12), np.float16)
    take_rows([chunk[:, ::2], np.broadcast_to(np.float16(7), (3, 6))], np.array([0, 1]), np.array([4, 2]), out[:, :6])
    assert out[0, :6].tolist() == chunk[4, ::2].tolist()
    assert out[1, :6].tolist() == [7] * 6


def test_take_rows_rejects_other_shapes_and_converts_other_dtypes(implementation):
    first = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="shape"):
        take_rows([np.ones((2, 16), np.float16)], first, first, np.zeros((1, 8), np.float16))
    out = np.zeros((1, 8), np.float16)
    take_rows([np.full((2, 8), 3, np.float32)], first, first, out)
    assert out.tolist() == [[3] * 8]


@needs_c
@pytest.mark.parametrize(
    ("of", "rows", "out"),
    [
        (np.zeros(2, np.int64), np.zeros(3, np.int64), np.zeros((3, 8), np.float16)),
        (np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros((2, 8), np.float16)),
        (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((1, 8), np.float16)),
    ],
)
def test_gather_rejects_a_target_of_another_size(of, rows, out):
    with pytest.raises(ValueError, match="do not hold"):
        module.gather((np.ones((4, 8), np.float16),), of, rows, out)


@needs_c
@pytest.mark.parametrize("rows", [[0, -1], [0, 4], [2**62, 0]])
def test_gather_never_reads_outside_a_chunk(rows):
    out = np.zeros((2, 8), np.float16)
    with pytest.raises(IndexError, match="is outside its chunk"):
        module.gather((np.ones((4, 8), np.float16),), np.zeros(2, np.int64), np.array(rows), out)
    assert not out.any()
