"""Numbers on their way from a GPU to the host, which does not wait for them."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Transfer(NamedTuple):
    """A copy of a vector of numbers, in page-locked memory if they come from a GPU, and the event of its arrival."""

    numbers: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def begin(cls, numbers_N: Tensor) -> Self:
        """Begin to copy numbers, after the operations that were queued before. On a CPU there is nothing to copy."""
        if numbers_N.device.type != "cuda":
            return cls(numbers_N, None)
        host_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True).copy_(
            numbers_N, non_blocking=True
        )
        return cls(host_N, torch.cuda.current_stream(numbers_N.device).record_event())

    def wait(self) -> list[float]:
        """Return the numbers. Without a pause, if a later step has been queued on the GPU since."""
        if self.arrived:
            self.arrived.synchronize()
        numbers: list[float] = self.numbers.tolist()
        return numbers
