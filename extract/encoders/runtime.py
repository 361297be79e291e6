"""The device and the precision that a network runs with. Differences between CPU and GPU are confined to this file."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.spread import spread
from sail_align.extract.errors import UserError

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes of weights and activations by name. `tf32` rounds the factors of products, on GPUs that can; elsewhere it is
float32."""
SHARED = 0.9
"""Part of a GPU's memory that processes share. The driver and libraries use some outside PyTorch's allocator."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)
_NO_MEMORY = re.compile(
    r"out of memory|_STATUS_(NOT_INITIALIZED|ALLOC_FAILED|\w+_ALLOCATION_FAILED)|unable to find an engine"
)
"""Messages of the driver, of cuBLAS and its kin, and of cuDNN, which finds no engine whose workspace fits."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU ran out of memory: PyTorch's allocator, a library or the driver."""
    by_message = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    return isinstance(error, torch.OutOfMemoryError) or bool(by_message)


def is_device_error(error: BaseException) -> bool:
    """Return whether an error comes from a GPU that ran out of memory or failed, not from the code that it ran."""
    is_failure = isinstance(error, getattr(torch, "AcceleratorError", ()))  # new in PyTorch 2.8
    return is_failure or is_out_of_memory(error) or "CUDA error" in str(error)


@contextmanager
def tf32_products(allowed: bool = False) -> Iterator[None]:
    """Allow or forbid TF32 in the float32 products and convolutions of a GPU within a `with` block or a function.

    PyTorch allows it in convolutions by default. Its flags are global, so they are restored at the end.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    flags: list[tuple[Any, str, Any]] = [(backend, *_read_tf32(backend)) for backend in backends]
    try:
        for backend, name, _ in flags:
            setattr(backend, name, allowed if name == "allow_tf32" else "tf32" if allowed else "ieee")
        yield
    finally:
        for backend, name, value in flags:
            setattr(backend, name, value)


def _read_tf32(backend: Any) -> tuple[str, Any]:
    """Return a backend's flag and its value. If a program set the flags of newer PyTorch, the older one is an error."""
    try:
        return "allow_tf32", backend.allow_tf32
    except RuntimeError:
        return "fp32_precision", backend.fp32_precision


def share_memory(device: str, processes: int) -> None:
    """Limit this process to its share of a GPU's memory, so that its batch size does not depend on what others try.

    Args:
        device: Device of this process.
        processes: Processes of this device.
    """
    if device.startswith("cuda") and processes > 1:
        for name in device.split(","):
            torch.cuda.set_per_process_memory_fraction(SHARED / processes, torch.device(name))


def require_tf32(device: str) -> None:
    """Raise `UserError` unless a type of device has TF32."""
    if device != "cuda":
        raise UserError(f"--precision tf32 needs an NVIDIA GPU, got device {device}. Use float32 or bfloat16.")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU computes in bfloat16. Those before Ampere (T4, V100) emulate it slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@dataclass(frozen=True)
class Runtime:
    """A device, and the precision of weights and activations. There is no fallback to another device or precision."""

    device: torch.device
    precision: str
    compiled: bool = False
    others: tuple[torch.device, ...] = ()
    """Devices that hold later blocks of the network."""

    @classmethod
    def of(cls, device: str, precision: str, *, compiled: bool = False, several: bool = False) -> "Runtime":
        """Check a user's choice. The device `auto` is a GPU if there is one; `cuda:0,cuda:1` are several.

        Raises:
            UserError: The precision is unknown, this machine lacks a device, or several are named where one is needed.
        """
        if precision not in PRECISIONS:
            raise UserError(f"Unknown precision {precision!r}. Choose one of: {', '.join(PRECISIONS)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        names = device.split(",")
        if len(names) > 1 and not several:
            raise UserError(f"--device is invalid: got {device}, expected one device. Several can extract features.")
        for name in names:
            try:
                torch.zeros(1, device=name).item()
            except (RuntimeError, AssertionError) as problem:
                raise UserError(f"Device {name!r} is not available on this machine. Use auto or cpu.") from problem
        first, *others = devices = [torch.device(name) for name in names]
        are_gpus = all(each.type == "cuda" and each.index is not None for each in devices)
        if others and (compiled or not are_gpus or len(set(devices)) < len(devices)):
            raise UserError(
                f"--device is invalid: got {device}, expected different GPUs, such as cuda:0,cuda:1, without --compile."
            )
        return cls(first, precision, compiled, tuple(others))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations. A program may have cast an encoder to float64."""
        dtype: torch.dtype = PRECISIONS.get(self.precision) or getattr(torch, self.precision)
        return dtype

    def explain(self) -> str:
        """Return what the precision costs or saves on a GPU, as a note to the user; "" if there is nothing to say."""
        if self.device.type != "cuda":
            return ""
        name, has = torch.cuda.get_device_name(self.device), has_bfloat16(self.device)
        if self.precision in ("float32", "tf32"):
            what = "exact" if self.precision == "float32" else "float32 with rounded products"
            half = "bfloat16" if has else "float16"
            return (
                f"Encoding in {self.precision}: {what}. --precision {half} is several times faster on {name}, with "
                "features within a cosine of 0.999 and rotary frequencies in float32. A store keeps its precision."
            )
        slow = self.precision == "bfloat16" and not has
        return f"{name} only emulates bfloat16. --precision float16 is faster." if slow else ""

    def freeze(self, network: nn.Module) -> nn.Module:
        """Return the network on the device, in the precision, in evaluation mode and without gradients.

        See `exact_buffers` for the buffers that stay in float32.
        """
        with exact_buffers(network):
            frozen = network.to(self.dtype).eval().requires_grad_(False)
            if self.others:
                spread(frozen, (self.device, *self.others))
            else:
                frozen.to(self.device)
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
            except RuntimeError as problem:
                if not is_out_of_memory(problem):
                    raise
                if not fits:
                    raise UserError(
                        "The encoder does not fit into the device's memory. Use --precision bfloat16."
                    ) from problem
                break
            fits = attempt
        else:
            return fits
        torch.cuda.empty_cache()  # only now: the exception held the activations
        return max(fits * 3 // 4, 1)


@contextmanager
def exact_buffers(network: nn.Module) -> Iterator[None]:
    """Keep the buffers that a cast within the block rounds in float32, or complex64, on the network's new device.

    Rotary frequencies are multiplied by positions, so that their rounding grows with the length of a text. Statistics
    of batch norms take the precision of their layer.
    """
    before = [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not hasattr(module, "running_var") and (buffer.is_floating_point() or buffer.is_complex())
    ]
    yield
    rounded = [(each, getattr(each[0], each[1])) for each in before]
    rounded = [(each, now) for each, now in rounded if now.dtype != each[2].dtype and _differs(each[2], now)]
    for (module, name, buffer), now in rounded:
        setattr(module, name, buffer.to(now.device, torch.complex64 if buffer.is_complex() else torch.float32))
    for layer in network.modules() if rounded else ():
        if isinstance(layer, _LAYERS) and _cast_inputs not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_cast_inputs)


def _differs(buffer: Tensor, cast: Tensor) -> bool:
    return buffer.is_complex() or not torch.equal(buffer, cast.to(buffer.device, buffer.dtype))


class FrozenEncoder(nn.Module):
    """An encoder as a module: `to`, `half` and `state_dict` cover its network.

    Attributes:
        network: The frozen network.
        identity: What a store and a run record. It is that of the encoder as it was loaded, before any later cast.
    """

    network: nn.Module
    identity: Identity

    def __init__(self, network: nn.Module, runtime: Runtime):
        super().__init__()
        self._runtime = runtime
        self.network = runtime.freeze(network)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self._runtime.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and activations."""
        return self._runtime.dtype

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with exact_buffers(self.network):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = next(self.parameters())
        same = weight.dtype == self.dtype
        precision = self._runtime.precision if same else str(weight.dtype).removeprefix("torch.")
        self._runtime = replace(self._runtime, device=weight.device, precision=precision)
        for measured in ("batch_size", "token_budget"):  # on the device before
            self.__dict__.pop(measured, None)
        return self


def in_own_precision(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a method of a `FrozenEncoder` without gradients, and with TF32 only if that is the encoder's precision."""

    @functools.wraps(method)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        encoder = cast(FrozenEncoder, arguments[0])
        with torch.no_grad(), tf32_products(encoder._runtime.precision == "tf32"):
            return method(*arguments, **options)

    return run


def _cast_inputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs of a layer in the dtype of its weights, because some networks pass it a float32 buffer."""
    weight: Any = layer.weight
    return inputs if weight is None else tuple(each.to(weight.dtype) for each in inputs)
