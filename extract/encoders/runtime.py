"""Where and in which precision a network runs."""

from dataclasses import dataclass

import torch
from torch import nn

from sail_align.extract.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device, and the precision of weights and activations. What the device cannot do fails; nothing falls back."""

    device: torch.device
    precision: str

    @classmethod
    def of(cls, device: str, precision: str) -> "Runtime":
        """Check a user's choice; the device `auto` is a GPU if there is one.

        Raises:
            UserError: There is no such precision, or no such device here.
        """
        if precision not in PRECISIONS:
            raise UserError(f"Unknown precision {precision!r}; use one of: {', '.join(PRECISIONS)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as problem:
            raise UserError(f"Device {device!r} is not available here; use auto or cpu.") from problem
        return cls(torch.device(device), precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return PRECISIONS[self.precision]

    def freeze(self, network: nn.Module) -> nn.Module:
        """Return the network on the device, in the precision, in evaluation mode and without gradients."""
        return network.to(self.device, self.dtype).eval().requires_grad_(False)
