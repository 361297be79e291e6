"""Settings and fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

# Tests run side by side, one worker per core, and most of their tensors are too small for threads to pay off. Child
# processes inherit the limit. It has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from warm_processes import WarmProcess, start

settings.register_profile("deterministic", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("deterministic")


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
