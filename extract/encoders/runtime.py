"""Where and in which precision a network runs: what differs between a CPU and a GPU is here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sail_align.extract.encoders.batches import largest_batch
from sail_align.extract.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device, and the precision of weights and activations. What the device cannot do fails; nothing falls back."""

    device: torch.device
    precision: str
    compiled: bool = False

    @classmethod
    def of(cls, device: str, precision: str, *, compiled: bool = False) -> "Runtime":
        """Check a user's choice; the device `auto` is a GPU if there is one.

        Raises:
            UserError: There is no such precision, or no such device here.
        """
        if precision not in PRECISIONS:
            raise UserError(f"Unknown precision {precision!r}; use one of: {', '.join(PRECISIONS)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as problem:
            raise UserError(f"Device {device!r} is not available here; use auto or cpu.") from problem
        return cls(torch.device(device), precision, compiled)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return PRECISIONS[self.precision]

    def freeze(self, network: nn.Module) -> nn.Module:
        """Return the network on the device, in the precision, in evaluation mode and without gradients."""
        frozen = network.to(self.device, self.dtype).eval().requires_grad_(False)
        if self.compiled:
            frozen.compile()
        return frozen

    def upload(self, batch: Tensor) -> Tensor:
        """Copy a batch to the device; a GPU fetches it out of `batch_memory` while the CPU goes on."""
        return batch.to(self.device, non_blocking=True)

    def batch_size(self, encode: Callable[[int], object], *, on_cpu: int, at_most: int) -> int:
        """Return how many items are best encoded at once: on a GPU as many as fit, found by trying."""
        return largest_batch(encode, at_most) if self.device.type == "cuda" else on_cpu


def batch_memory(*shape: int) -> Tensor:
    """Return memory for a batch of bytes; it is page-locked where this process uses a GPU."""
    cuda: Any = torch.cuda  # has no type hints there
    return torch.empty(shape, dtype=torch.uint8, pin_memory=cuda.is_initialized())


def can_compile(device: str) -> bool:
    """Tell whether torch.compile works here: it needs a C++ compiler, or for a GPU Triton."""
    runtime = Runtime.of(device, "float32")
    try:
        torch.compile(torch.sin)(torch.ones(8, device=runtime.device))
    except (RuntimeError, OSError):
        return False
    return True
