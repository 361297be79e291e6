"""Precision and free memory of the device that training uses."""

from contextlib import AbstractContextManager
from typing import cast

import torch

from sail_align.align.settings import Precision
from sail_align.extract.errors import UserError
from sail_align.extract.system.memory import free_memory


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Return the precision of matrix products; `auto` is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        UserError: The device does not support it.
    """
    on_gpu = device.type == "cuda"
    if asked == "auto":
        return "bfloat16" if on_gpu else "float32"
    if asked == "tf32" and not on_gpu:
        raise UserError(f"--precision tf32 needs an NVIDIA GPU, got device {device.type}. Use float32 or bfloat16.")
    return cast("Precision", asked)


def products_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that computes matrix products in a precision, and everything else in float32."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process can still allocate on a GPU, or on the machine within its container."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    return free_memory()
