"""How much is encoded at once, against a memory that is counted."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_image_processor, save_randomised, save_tokenizer
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from sail_align.extract.encoders.load import load_image_encoder, load_text_encoder
from sail_align.extract.encoders.runtime import Runtime, largest_batch, pack
from sail_align.extract.errors import UserError

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Memory:
    """Takes so many items, and remembers what was tried."""

    def __init__(self, room: int):
        self.room = room
        self.tried = []

    def __call__(self, items: int) -> None:
        self.tried.append(items)
        if items > self.room:
            raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("room", "largest"), [(1, 1), (2, 1), (3, 1), (5, 3), (100, 48), (255, 96), (256, 256), (10**6, 256)]
)
def test_the_batch_is_doubled_until_memory_runs_out_and_a_quarter_is_left(room, largest):
    memory = Memory(room)
    assert largest_batch(memory, limit=256) == largest
    assert memory.tried == [2**i for i in range(len(memory.tried))]
    assert max(memory.tried) <= 256


def test_an_encoder_for_which_there_is_no_room_is_one_sentence():
    with pytest.raises(UserError, match="does not fit into the device's memory"):
        largest_batch(Memory(0), limit=256)


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 500))
def test_batches_hold_each_item_once_and_keep_to_the_budget(lengths, budget):
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
    """Batches are found as on a GPU; it takes 100 pictures or tokens."""

    def batch_size(runtime, encode, *, on_cpu, at_most):
        memory = Memory(100)

        def attempt(items: int) -> None:
            memory(items)
            encode(items)

        return largest_batch(attempt, at_most)

    monkeypatch.setattr(Runtime, "batch_size", batch_size)


def test_pictures_are_tried_in_the_encoders_own_size(tmp_path, small_gpu):
    save_randomised(ViTModel(ViTConfig(**TINY, intermediate_size=64, image_size=56, patch_size=14)), tmp_path)
    save_image_processor(tmp_path)
    assert load_image_encoder(f"hf:{tmp_path}", pooling="cls").batch_size == 48


def test_a_batch_of_short_texts_is_larger_than_one_of_long_texts(tmp_path, small_gpu):
    save_randomised(BertModel(BertConfig(**TINY, vocab_size=32, intermediate_size=64)), tmp_path)
    save_tokenizer(tmp_path)
    encoder = load_text_encoder(f"hf:{tmp_path}", pooling="mean")
    done = []
    encoder.encode(["the dog"] * 30 + ["the dog runs on the grass and the cat sleeps under a bench"] * 6, done.append)
    assert encoder.token_budget == 48
    assert done == [12, 12, 6, 3, 3]  # of 4 and of 15 tokens
