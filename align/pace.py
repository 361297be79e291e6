"""How fast a run is, for its progress line."""

import resource
import sys
import time

import torch

from sail_align.align.stream import Stream

WINDOW_SECONDS = 2.0
"""Rates are over at least so much time."""


class Pace:
    """Pairs and bytes a second, the share of the time that data were waited for, and memory at its highest."""

    def __init__(self, stream: Stream, batch_size: int, device: torch.device):
        self._stream, self._batch_size, self._device = stream, batch_size, device
        self._steps = 0
        self._before = self._now()
        self._said = ""

    def stepped(self) -> str:
        """Count a step; return what is known of the pace, in words, "" at first."""
        self._steps += 1
        now = self._now()
        seconds, steps, read, waited = (new - old for new, old in zip(now, self._before, strict=True))
        if seconds >= WINDOW_SECONDS:
            self._before = now
            self._said = (
                f"{steps * self._batch_size / seconds:,.0f} pairs/s, {read / seconds / 1e9:.2g} GB/s read, "
                f"{waited / seconds:.0%} waiting for data, {self._peak_bytes() / 1e9:.1f} GB"
            )
        return self._said

    def _now(self) -> tuple[float, float, float, float]:
        return time.monotonic(), self._steps, self._stream.bytes_read, self._stream.wait_seconds

    def _peak_bytes(self) -> int:
        """Return the most memory that was held so far: of the GPU, or of this process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10  # kilobytes on Linux
