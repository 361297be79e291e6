"""Settings and fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from hypothesis import settings

# Tests run side by side, one worker per core, and most of their tensors are too small for threads to pay off. Child
# processes inherit the limit. It has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from warm_processes import WarmProcess, start

settings.register_profile("deterministic", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("deterministic")


@pytest.fixture
def use_card(monkeypatch) -> Callable[[str, int], None]:
    """Let torch report a GPU of this name and major compute capability. Nothing can run on it."""

    def use(name: str, capability: int) -> None:
        import torch

        about = SimpleNamespace(name=name, major=capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        # As by default it says True for a T4.
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True, raising=False)

    return use


@pytest.fixture
def start_warm() -> Iterator[Callable[..., WarmProcess]]:
    """Start functions in warm processes; kill those that still run when the test ends."""
    started: list[WarmProcess] = []

    def start_and_note(*arguments, **options) -> WarmProcess:
        started.append(start(*arguments, **options))
        return started[-1]

    yield start_and_note
    for process in started:
        process.close()
