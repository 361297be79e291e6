"""The peak memory of a step of the paper's batch, counted tensor by tensor on a device that computes nothing.

The counts are of float32 products; under bfloat16 autocast activations take half. A GPU's allocator, libraries and the
batches that are copied ahead come on top.
"""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sail_align.align.data.loader import Batch
from sail_align.align.model import fused as functions
from sail_align.align.model import pair_blocks as blocks
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import sigmoid_loss
from sail_align.align.settings import FitSettings
from sail_align.align.train import step
from sail_align.align.train.distributed import World
from sail_align.align.train.step import Stepper, make_optimizer

pytestmark = pytest.mark.slow

NOWHERE = torch.device("meta")
GB = 10**9


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self, *tensors):
        super().__init__()
        self.now, self._storages = 0, weakref.WeakSet()
        self.count(tensors)
        self.before = self.most = self.now

    def count(self, results):
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._storages:
                self._storages.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.count(results)
        self.most = max(self.most, self.now)
        return results


class OneOf(World):
    """One of several processes, without the others."""

    def spans(self, rows):
        return [slice(rank * rows, (rank + 1) * rows) for rank in range(self.size)]

    def gather(self, part_NE, spans):
        return part_NE if self.size == 1 else part_NE.new_empty(spans[-1].stop, part_NE.shape[1])

    def scatter_sum(self, all_ME, spans):
        return all_ME[spans[self.rank]]

    def sum(self, *tensors):
        pass


@pytest.fixture
def second_step(monkeypatch):
    """Take two steps where so much memory is free; return image passes and bytes of the second.

    By default that is what `Stepper.memory` states, less the state of the optimiser after the first step.
    """
    monkeypatch.setattr(Stepper, "products", lambda _: nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "randint", lambda *_: 0)
    for module, name in ((blocks, "MANY_PAIRS"), (functions, "MANY_UNITS")):
        monkeypatch.setattr(module, name, 1 << 60)

    def take(free=None, processes=1, expansion=4, rows=36_864, captions=2):
        monkeypatch.setattr(step, "free_memory", lambda: 1 << 40 if free is None else free)
        with NOWHERE:
            model = Architecture("glu", 2_048, 1_024, 1_024, expansion).build()
            rows //= processes
            batch = Batch(torch.empty(rows, 2_048).half(), torch.empty(captions, rows, 1_024).half())
        optimizer = make_optimizer(model, FitSettings(steps=2))
        used = Stepper(model, sigmoid_loss, optimizer, NOWHERE, in_parts=True, world=OneOf(0, processes))
        used.step(batch, 1e-5)
        if free is None:
            states = sum(each["exp_avg"].nbytes for each in optimizer.state.values())
            left = used.memory(rows, captions) - states
            monkeypatch.setattr(step, "free_memory", lambda: left)
        passes = []
        model.image_head.register_forward_hook(lambda _head, features, _out: passes.append(len(features[0])))
        optimizer.zero_grad()
        with Held(list(model.parameters()), list(optimizer.state.values()), batch) as held:
            used.step(batch, 1e-5)
        return sum(passes) / rows, held

    return take


@pytest.mark.parametrize(("processes", "expansion", "most"), [(1, 4, 4.6), (8, 4, 1.8)])
def test_the_papers_batch_fits_a_24_gb_card_without_computing_anything_twice(second_step, processes, expansion, most):
    passes, held = second_step(22 * GB, processes, expansion)
    assert passes == 1
    assert most - 0.2 < held.most / GB < most


def test_a_step_takes_no_more_than_is_free(second_step):
    free = 4
    passes, held = second_step(free * GB)
    assert 1 < passes < 2
    assert (free - 1) * GB / 2 < held.most - held.before < free * GB


def test_two_gigabytes_do_for_the_papers_batch(second_step):
    passes, held = second_step(0)
    assert passes == 2
    assert held.most < 2 * GB


@pytest.mark.parametrize(
    ("rows", "processes", "expansion", "captions"),
    [(8_192, 1, 4, 2), (4_096, 1, 4, 1), (512, 1, 1, 3)],
)
def test_stated_memory_is_enough_to_compute_nothing_twice(second_step, rows, processes, expansion, captions):
    passes, held = second_step(None, processes, expansion, rows, captions)
    assert passes == 1
    assert held.most - held.before <= step.free_memory() < 2.1 * (held.most - held.before)
