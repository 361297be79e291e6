"""Copies of batches to a device, with fakes that record the order of a GPU's operations."""

from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import torch

from sail_align.align.data.loader import Batch, Stream
from sail_align.align.data.sampler import StreamState


def test_batches_on_a_cpu_are_not_copied():
    served = [(Batch(torch.zeros(2, 3), torch.ones(1, 2, 3)), StreamState(0, number)) for number in range(3)]
    stream = SimpleNamespace(batches=lambda _: iter(served))
    passed_on = list(Stream.batches_on(stream, torch.device("cpu")))
    assert all(one is other for one, other in zip(passed_on, served, strict=True))


def test_copy_to_a_gpu_ends_before_its_buffer_is_reused(monkeypatch):
    calls: list[str] = []

    class Part:
        def __init__(self, name):
            self.name = name

        def to(self, device, *, non_blocking):
            assert (device.type, non_blocking) == ("cuda", True)
            calls.append(f"copy {self.name}")
            return self

        def record_stream(self, stream):
            assert stream == "main"

    class Copying:
        def __init__(self, device):
            self.number = 0

        def record_event(self):
            self.number += 1
            return Event(self.number)

    class Event:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            calls.append(f"copied {self.number}")

    monkeypatch.setattr(torch.cuda, "Stream", Copying)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")

    def batches(_):
        for number in range(1, 9):
            calls.append(f"ask {number}")
            yield Batch(Part(f"x{number}"), Part(f"y{number}")), StreamState(0, number)

    for batch, state in islice(Stream.batches_on(SimpleNamespace(batches=batches), torch.device("cuda")), 2):
        calls.append(f"work on {batch.images.name} {state.batch}")
    first = ["ask 1", "copy x1", "copy y1"]
    second = ["copied 1", "ask 2", "copy x2", "copy y2", "work on x1 1"]
    third = ["copied 2", "ask 3", "copy x3", "copy y3", "work on x2 2"]
    assert calls == first + second + third
