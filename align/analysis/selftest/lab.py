"""Device, folder and pass criteria shared by all checks of a self-test."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["pass", "FAIL", "skipped"]
Difference = Callable[[Iterable[Tensor], Iterable[Tensor]], float]
"""A function of corresponding tensors, found and exact, that is 0 if they are equal."""

SLOWER_ALONE = 1.5
"""Factor of safety for the time that a check is expected to take."""


class SkippedError(Exception):
    """A check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Lab:
    """The device and the folder of a self-test.

    Attributes:
        device: The device under test.
        folder: Folder for temporary files.
        deadline: Time of `time.monotonic` after which no check begins.
    """

    device: torch.device
    folder: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """A check: it passes if what it measures is at most its bound.

    Attributes:
        name: Name for the table.
        bound: The bound.
        seconds: Seconds that it is expected to take on two CPU cores.
        measure: Makes the check and returns a number.
    """

    name: str
    bound: float
    seconds: float
    measure: Callable[[Lab], float]

    def run(self, lab: Lab) -> "Outcome":
        """Run the check, or skip it if no time is left."""
        begun = time.monotonic()
        result: float | None = None
        verdict: Verdict = "skipped"
        note = ""
        if lab.seconds_left < SLOWER_ALONE * self.seconds:
            return Outcome(self.name, None, self.bound, "skipped", "no time left; raise --minutes", 0.0)
        try:
            result = self.measure(lab)
            lab.synchronize()
            verdict = "pass" if result <= self.bound else "FAIL"
        except SkippedError as reason:
            note = str(reason)
        except Exception as problem:  # noqa: BLE001 (one check must not end the others)
            verdict, note = "FAIL", f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        return Outcome(self.name, result, self.bound, verdict, note, time.monotonic() - begun)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        check: Its name.
        result: What it measured; None if it was skipped or raised an error.
        bound: Its bound.
        verdict: Whether it passed.
        note: Why it was skipped, or the error.
        seconds: Seconds that it took.
    """

    check: str
    result: float | None
    bound: float
    verdict: Verdict
    note: str
    seconds: float


def largest_difference(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Return the largest absolute difference of corresponding tensors, relative to the largest exact value of each.

    NaN counts as infinity.
    """
    worst = 0.0
    for one, other in zip(found, exact, strict=True):
        other = other.detach().double().cpu()
        difference = (one.detach().double().cpu() - other).abs().max() / other.abs().max().clamp(min=1e-300)
        worst = max(worst, _number(difference))
    return worst


def relative_norm(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Return the largest norm of the difference of corresponding tensors, relative to the norm of the exact one."""
    worst = 0.0
    for one, other in zip(found, exact, strict=True):
        other = other.detach().double().cpu()
        difference = (one.detach().double().cpu() - other).norm() / other.norm().clamp(min=1e-300)
        worst = max(worst, _number(difference))
    return worst


def _number(value: Tensor) -> float:
    number = float(value)
    return math.inf if math.isnan(number) else number
