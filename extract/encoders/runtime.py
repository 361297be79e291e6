"""The device and the precision that a network runs with. Differences between CPU and GPU are confined to this file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sail_align.extract.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device, and the precision of weights and activations. There is no fallback to another device or precision."""

    device: torch.device
    precision: str
    compiled: bool = False

    @classmethod
    def of(cls, device: str, precision: str, *, compiled: bool = False) -> "Runtime":
        """Check a user's choice. The device `auto` is a GPU if there is one.

        Raises:
            UserError: The precision is unknown, or this machine lacks the device.
        """
        if precision not in PRECISIONS:
            raise UserError(f"Unknown precision {precision!r}. Choose one of: {', '.join(PRECISIONS)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as problem:
            raise UserError(f"Device {device!r} is not available on this machine. Use auto or cpu.") from problem
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

    @staticmethod
    def host_buffer(*shape: int) -> Tensor:
        """Return uninitialised uint8 memory on the CPU. It is page-locked if this process uses a GPU (see `upload`)."""
        cuda: Any = torch.cuda  # `is_initialized` has no type hints
        return torch.empty(shape, dtype=torch.uint8, pin_memory=cuda.is_initialized())

    def upload(self, batch: Tensor) -> Tensor:
        """Copy a batch to the device. From a `host_buffer` to a GPU, the copy is asynchronous."""
        return batch.to(self.device, non_blocking=True)

    def batch_size(self, encode: Callable[[int], object], *, on_cpu: int, at_most: int) -> int:
        """Return the number of items to encode at once.

        On a GPU it is found by trying 1, 2, 4 … items. If memory runs out, the largest batch that fitted is reduced by
        a quarter, because batches vary.

        Args:
            encode: Encodes this many items.
            on_cpu: What to return for a CPU.
            at_most: Largest number to try on a GPU, a power of two.

        Raises:
            UserError: Not even one item fits.
        """
        if self.device.type != "cuda":
            return on_cpu
        fits = 0
        while fits < at_most:
            attempt = fits * 2 or 1
            try:
                encode(attempt)
            except torch.OutOfMemoryError as problem:
                if not fits:
                    raise UserError(
                        "The encoder does not fit into the device's memory. Use --precision bfloat16."
                    ) from problem
                torch.cuda.empty_cache()
                return max(fits * 3 // 4, 1)
            fits = attempt
        return fits
