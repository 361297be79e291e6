"""The device that a `--device` names."""

import torch

from sail_align.extract.errors import UserError


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU if there is one, else the CPU.

    Raises:
        UserError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise UserError(f"Device {name!r} is not available here; use cpu, auto, or one that torch finds.") from problem
    return torch.device(name)
