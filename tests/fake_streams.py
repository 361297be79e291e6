"""Streams, events and page-locked memory of a GPU that computes nothing.

A copy between page-locked memory and the GPU ends as late as it may: when the program waits for its stream. Until then
a change of the memory that is copied from is an error, and memory that is copied to holds no values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import pytest
import torch
from torch import Tensor


class RaceError(AssertionError):
    """The result on a GPU would depend on timing."""


@dataclass(eq=False)
class Copy:
    """A copy in flight.

    Attributes:
        stream: Its stream.
        source: Page-locked memory that is copied from, and its content at the beginning.
        target: Page-locked memory that is copied to.
    """

    stream: "FakeStream"
    source: tuple[Tensor, Tensor] | None = None
    target: Tensor | None = None

    def check(self) -> None:
        """Raise `RaceError` if the source has changed."""
        if self.source and not torch.equal(*self.source):
            raise RaceError("Memory was written while a copy from it was in flight.")

    def end(self) -> None:
        """End the copy."""
        self.check()
        if self.target is not None:
            self.target.fill_(1)


@dataclass(eq=False)
class FakeStream:
    """A stream: `pending` copies are those which it has begun, or waits for."""

    card: "Streams"
    pending: dict[Copy, None] = field(default_factory=dict)

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        event = event or FakeEvent(self.card)
        event.pending = dict(self.pending)
        return event

    def wait_event(self, event: "FakeEvent") -> None:
        self.pending |= event.pending

    def wait_stream(self, stream: "FakeStream") -> None:
        self.pending |= stream.pending

    def synchronize(self) -> None:
        self.card.end(self.pending)


@dataclass(eq=False)
class FakeEvent:
    card: "Streams"
    pending: dict[Copy, None] = field(default_factory=dict)

    def record(self, stream: FakeStream | None = None) -> None:
        (stream or self.card.current).record_event(self)

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream or self.card.current).wait_event(self)

    def synchronize(self) -> None:
        self.card.end(self.pending)

    def query(self) -> bool:
        return not any(each in self.card.in_flight for each in self.pending)


class Streams:
    """The streams of a GPU and the copies in flight."""

    def __init__(self) -> None:
        self.default = self.current = FakeStream(self)
        self.in_flight: dict[Copy, None] = {}
        self._pinned: WeakSet[Any] = WeakSet()
        self._made_by: WeakKeyDictionary[Any, Copy] = WeakKeyDictionary()  # by the storage on the GPU
        self._allowed: WeakKeyDictionary[Any, set[FakeStream]] = WeakKeyDictionary()

    def pin(self, tensor: Tensor) -> Tensor:
        """Make the memory of a tensor page-locked."""
        self._pinned.add(tensor.untyped_storage())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._pinned

    def upload(self, source: Tensor, made: Tensor) -> None:
        """Begin a copy to a tensor on the GPU. The program waits if the memory is not page-locked."""
        if self.is_pinned(source):
            copy = self._begin(Copy(self.current, source=(source, source.clone())))
            self._made_by[made.untyped_storage()] = copy

    def download(self, target: Tensor) -> Tensor:
        """Begin a copy from the GPU, with which the program does not wait."""
        self._begin(Copy(self.current, target=target.fill_(True if target.dtype == torch.bool else 77)))
        return target

    def use(self, tensor: Tensor) -> None:
        """Raise `RaceError` if the current stream may read a tensor on the GPU too early, or too late."""
        storage = tensor.untyped_storage()
        if (copy := self._made_by.get(storage)) is None or copy.stream is self.current:
            return
        if copy in self.in_flight and copy not in self.current.pending:
            raise RaceError("A stream reads a tensor before it was copied: wait for the copy.")
        if self.current not in self._allowed.get(storage, ()):
            raise RaceError("The memory of a tensor may be reused while a stream reads it: call record_stream.")

    def allow(self, tensor: Tensor, stream: FakeStream) -> None:
        """Keep the memory of a tensor until a stream has read it: `record_stream`."""
        self._allowed.setdefault(tensor.untyped_storage(), set()).add(stream)

    def end(self, copies: dict[Copy, None] | None = None) -> None:
        """End copies, by default all: the program has waited for them."""
        for copy in list(self.in_flight if copies is None else copies):
            if copy in self.in_flight:
                del self.in_flight[copy]
                copy.end()

    def _begin(self, copy: Copy) -> Copy:
        for other in self.in_flight:
            other.check()
        self.in_flight[copy] = self.current.pending[copy] = None
        return copy

    @contextmanager
    def within(self, stream: FakeStream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace the functions of torch.cuda."""
        patch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: FakeStream(self))
        patch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(self))
        patch.setattr(torch.cuda, "stream", self.within)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "default_stream", lambda device=None: self.default)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: self.end())
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.allow(tensor, stream))
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor, device=None: self.is_pinned(tensor))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: self.pin(tensor.clone()))
