"""Batch sizes, with a simulated memory of limited size."""

import sys
import weakref
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_image_processor, save_randomised, save_tokenizer
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.text import pack
from sail_align.extract.errors import UserError

GPU = Runtime(torch.device("cuda"), "float32")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
]


class Memory:
    """Encodes at most `room` items, and records what was tried."""

    def __init__(self, room: int, error: RuntimeError = NO_MEMORY[0]):
        self.room = room
        self.error = error
        self.tried = []

    def __call__(self, items: int) -> None:
        self.tried.append(items)
        if items > self.room:
            raise self.error


@pytest.mark.parametrize(
    ("room", "largest"), [(1, 1), (2, 1), (3, 1), (5, 3), (100, 48), (255, 96), (256, 256), (10**6, 256)]
)
def test_batch_is_doubled_until_memory_runs_out_then_reduced_by_a_quarter(room, largest):
    memory = Memory(room)
    assert GPU.batch_size(memory, on_cpu=32, at_most=256) == largest
    assert memory.tried == [2**i for i in range(len(memory.tried))]
    assert max(memory.tried) <= 256


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:50])
def test_search_recognises_the_errors_of_all_that_allocates_memory(error):
    assert GPU.batch_size(Memory(100, error), on_cpu=32, at_most=256) == 48


def test_search_raises_other_errors():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        GPU.batch_size(Memory(100, RuntimeError("CUDA error: an illegal memory access")), on_cpu=32, at_most=256)


def test_memory_is_released_when_nothing_holds_the_activations(monkeypatch):
    activations = weakref.WeakSet()

    def encode(items):
        activations.add(held := torch.empty(items))
        if items > 4:
            raise torch.OutOfMemoryError("out of memory")
        del held

    released = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append((len(activations), sys.exception())))
    assert GPU.batch_size(encode, on_cpu=32, at_most=256) == 3
    assert released == [(0, None)]


def test_batch_size_reports_that_not_even_one_item_fits():
    with pytest.raises(UserError, match="does not fit into the device's memory"):
        GPU.batch_size(Memory(0), on_cpu=32, at_most=256)


@pytest.mark.slow
@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 500))
def test_pack_keeps_every_item_once_and_the_budget(lengths, budget):
    batches = pack(lengths, budget)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(ordered)
    for one, after in pairwise(batches):
        assert (len(one) + 1) * lengths[after[0]] > budget  # the next one did not fit


@pytest.fixture
def small_gpu(monkeypatch):
    """Find batch sizes as on a GPU whose memory holds 100 images or tokens."""
    original, memory = Runtime.batch_size, Memory(100)

    def batch_size(runtime, encode, *, on_cpu, at_most):
        def attempt(items: int) -> None:
            memory(items)
            encode(items)

        return original(GPU, attempt, on_cpu=on_cpu, at_most=at_most)

    monkeypatch.setattr(Runtime, "batch_size", batch_size)
    return memory


def test_image_batch_size_is_found_with_images_of_the_encoders_size(tmp_path, small_gpu):
    save_randomised(ViTModel(ViTConfig(**TINY, intermediate_size=64, image_size=56, patch_size=14)), tmp_path)
    save_image_processor(tmp_path)
    assert ImageEncoderConfig(f"hf:{tmp_path}", pooling="cls").load().batch_size == 48


def test_batches_of_short_texts_are_larger(tmp_path, small_gpu):
    save_randomised(BertModel(BertConfig(**TINY, vocab_size=32, intermediate_size=64)), tmp_path)
    save_tokenizer(tmp_path)
    encoder = TextEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()
    assert small_gpu.tried == []  # the golden vectors need no batches
    done = []
    encoder.encode(["the dog"] * 30 + ["the dog runs on the grass and the cat sleeps under a bench"] * 6, done.append)
    assert encoder.token_budget == 48
    assert done == [12, 12, 6, 3, 3]  # of 4 and of 15 tokens
