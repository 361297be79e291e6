"""Files of safetensors: the same bytes for the same content in any order, and readable by the library."""

import random
import struct

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sail_align.align.runs.tensors import save_arrays, save_tensors

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda n: n != "__metadata__"
)


def shuffled(mapping, seed):
    items = list(mapping.items())
    random.Random(seed).shuffle(items)
    return dict(items)


@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(["f4", "i8", "u1"]), st.lists(st.integers(0, 3), max_size=3))),
    st.dictionaries(st.text(max_size=6).filter(str.isprintable), st.text(max_size=12), max_size=6),
    st.integers(0, 99),
)
def test_arrays_have_equal_bytes_in_any_order(tmp_path_factory, shapes, metadata, seed):
    arrays = {name: np.arange(np.prod(shape)).reshape(shape).astype(kind) for name, (kind, shape) in shapes.items()}
    content = save_arrays(arrays, metadata)
    assert content == save_arrays(shuffled(arrays, seed), shuffled(metadata, seed))
    path = tmp_path_factory.getbasetemp() / "arrays.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="numpy") as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(arrays)
        for name, values in arrays.items():
            assert np.array_equal(file.get_tensor(name), values)
            assert file.get_tensor(name).dtype == values.dtype


def test_tensors_have_the_bytes_that_safetensors_writes():
    """The digests of checkpoints of earlier versions stay those of the same weights."""
    torch.manual_seed(0)
    tensors = {"b": torch.rand(3, 2), "ä": torch.rand(5), "a.weight": torch.arange(7), "half": torch.rand(3).half()}
    assert save_tensors(tensors) == safetensors.torch.save(tensors)
    assert save_tensors({name: tensors[name] for name in reversed(tensors)}) == save_tensors(tensors)
    assert safetensors.torch.load(save_tensors(tensors)).keys() == tensors.keys()


@pytest.mark.parametrize("length", range(1, 17))
def test_data_stay_aligned(length):
    content = save_arrays({"x": np.arange(3)}, {"run": "d" * length})
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0
    assert content[8:9] == b"{"
    assert np.array_equal(safetensors.numpy.load(content)["x"], [0, 1, 2])
