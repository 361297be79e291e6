"""The order of a self-test's checks and measurements, and its report."""

import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sail_align.align.analysis.selftest import encoders, fits, training
from sail_align.align.analysis.selftest.lab import Check, Lab, Outcome
from sail_align.align.analysis.selftest.rates import Rate, Rates
from sail_align.align.stats.tables import format_table

SCHEMA = 1
FOR_RATES = 0.3
"""Share of the time that is kept for measurements."""
MEASUREMENTS = 12
"""Measurements that share this time, about half of it for warming up."""
LIBRARIES = ("sail-align", "torch", "triton", "transformers", "timm", "lion-pytorch", "numpy", "zarr", "safetensors")


@dataclass(frozen=True)
class SelfTest:
    """A finished self-test.

    Attributes:
        device: Description of the device.
        versions: Versions of this system.
        outcomes: Outcomes of the checks.
        rates: The measurements.
        seconds: Time that it took.
        minutes: Time that it was given.
    """

    device: dict[str, Any]
    versions: dict[str, str]
    outcomes: Sequence[Outcome]
    rates: Sequence[Rate]
    seconds: float
    minutes: float

    @classmethod
    def run(cls, device: torch.device, minutes: float, say: Callable[[str], object] = lambda line: None) -> "SelfTest":
        """Make all checks and measurements for which there is time.

        Args:
            device: The device under test.
            minutes: The time. A check that has begun is finished.
            say: Called with the name of each check before it begins.
        """
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sail-selftest-") as folder:
            end = begun + 60 * minutes
            lab = Lab(device, Path(folder), end - FOR_RATES * 60 * minutes)
            outcomes = []
            for check in all_checks():
                say(check.name)
                outcomes.append(check.run(lab))
            say("rates")
            rates = Rates(replace(lab, deadline=end), FOR_RATES * 60 * minutes / MEASUREMENTS / 2).measure_all()
        return cls(describe_device(device), versions(), outcomes, rates, time.monotonic() - begun, minutes)

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(each.verdict == "FAIL" for each in self.outcomes)

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-able data."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "versions": self.versions,
            "minutes": self.minutes,
            "seconds": round(self.seconds, 1),
            "failed": self.failed,
            "checks": [asdict(each) for each in self.outcomes],
            "rates": [asdict(each) for each in self.rates],
        }

    def table(self) -> str:
        """Return the table of the checks, then that of the rates."""
        rows = [
            (each.check, _number(each.result), _number(each.bound), each.verdict, each.note) for each in self.outcomes
        ]
        shares = [
            (
                each.name,
                _number(each.value, 3),
                each.unit,
                "" if each.share is None else f"{each.share:.0%} of {each.of}",
                each.note,
            )
            for each in self.rates
        ]
        checks = format_table(("check", "result", "bound", "verdict", ""), rows, "lrrll", style="simple")
        return f"{checks}\n\n" + format_table(("rate", "", "", "share", ""), shares, "lrlll", style="simple")

    def summary(self) -> str:
        """Return the counts of verdicts in one line."""
        counts = {word: sum(each.verdict == word for each in self.outcomes) for word in ("pass", "FAIL", "skipped")}
        return (
            f"{counts['pass']} checks passed, {counts['FAIL']} failed, {counts['skipped']} skipped, in "
            f"{self.seconds:.0f} s on {self.device['name']}"
        )


def all_checks() -> Iterator[Check]:
    """Yield the checks, the most important first."""
    return chain(training.checks(), encoders.checks(), fits.checks())


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return what is known about a device."""
    if device.type != "cuda":
        name = platform.processor() or platform.machine()
        return {"type": device.type, "name": name, "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "bytes": about.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "processors": about.multi_processor_count,
        "count": torch.cuda.device_count(),
    }


def versions() -> dict[str, str]:
    """Return the versions of this system and of the libraries that are installed."""
    found = {"python": sys.version.split()[0], "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found | {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
