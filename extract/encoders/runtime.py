"""Where and in which precision a network runs: what differs between a CPU and a GPU is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sail_align.extract.errors import UserError


def largest_batch(encode: Callable[[int], object], limit: int) -> int:
    """Return how many items a device's memory takes: 1, 2, 4 … are tried up to `limit`, itself a power of two.

    A quarter is left free where memory ran out, for what varies between batches.

    Raises:
        UserError: Not even one fits.
    """
    fits = 0
    while fits < limit:
        try:
            encode(fits * 2 or 1)
        except torch.OutOfMemoryError as problem:
            if not fits:
                raise UserError(
                    "The encoder does not fit into the device's memory; use --precision bfloat16."
                ) from problem
            torch.cuda.empty_cache()
            return max(fits * 3 // 4, 1)
        fits = fits * 2 or 1
    return fits


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items of like length together: the positions of each batch, shortest items first.

    A batch padded to its longest item has at most `budget` cells, unless one item alone has more.
    """
    batches: list[list[int]] = [[]]
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[position] > budget:
            batches.append([])
        batches[-1].append(position)
    return batches if lengths else []


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
