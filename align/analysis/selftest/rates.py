"""Rates of a device, and how close the parts of the pipeline come to them."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sail_align.align.analysis.selftest import encoders, fits
from sail_align.align.analysis.selftest.lab import Lab, SkippedError
from sail_align.align.data.loader import Batch, Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import sigmoid_loss
from sail_align.align.settings import FitSettings, Precision
from sail_align.align.train.cost import step_flops
from sail_align.align.train.step import Stepper, make_optimizer
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.errors import UserError

LEAST_REPEATS = 3


@dataclass(frozen=True)
class Size:
    """Sizes of the measurements: those of the paper on a GPU, small ones on a CPU.

    Attributes:
        matrix: Rows of a square matrix.
        copied: Bytes of a copy.
        batch: Pairs of a step.
        image_dim: Dimensions of image features.
        text_dim: Dimensions of text features.
        dim: Dimensions of embeddings.
        rows: Rows of the store that is streamed.
    """

    matrix: int
    copied: int
    batch: int
    image_dim: int
    text_dim: int
    dim: int
    rows: int


ON_GPU = Size(8_192, 1 << 28, 16_384, 2_048, 1_024, 1_024, 80_000)
ON_CPU = Size(768, 1 << 25, 256, 256, 128, 128, 8_192)
CAPTIONS = 2


@dataclass(frozen=True)
class Rate:
    """A measured rate.

    Attributes:
        name: What was measured.
        value: The rate.
        unit: Its unit.
        share: The rate relative to the one it is limited by; None for a rate of the device itself.
        of: Name of that one.
        note: Reason why nothing was measured.
    """

    name: str
    value: float | None
    unit: str
    share: float | None = None
    of: str = ""
    note: str = ""


class Rates:
    """Measures one rate after the other, each for some seconds."""

    def __init__(self, lab: Lab, seconds: float):
        self.lab, self.size, self.seconds = lab, ON_GPU if lab.on_gpu else ON_CPU, seconds
        self.found: dict[str, Rate] = {}

    def measure_all(self) -> list[Rate]:
        """Return all rates. One that fails has a note in place of a value."""
        for name, measure in _measures(self.lab):
            if self.lab.seconds_left < 0:
                self.found[name] = Rate(name, None, "", note="no time left; raise --minutes")
                continue
            try:
                self.found[name] = measure(self, name)
            except (SkippedError, UserError) as reason:
                self.found[name] = Rate(name, None, "", note=str(reason))
            except Exception as problem:  # noqa: BLE001 (one measurement must not end the others)
                note = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
                self.found[name] = Rate(name, None, "", note=note)
        return list(self.found.values())

    def time(self, work: Callable[[], object]) -> float:
        """Return the median of the seconds that some work takes."""
        work()
        self.lab.synchronize()
        seconds: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(seconds) < LEAST_REPEATS or time.perf_counter() < end:
            begun = time.perf_counter()
            work()
            self.lab.synchronize()
            seconds.append(time.perf_counter() - begun)
        return median(seconds)

    def rate(self, name: str, value: float, unit: str, of: str = "") -> Rate:
        """Return a rate with its share of another one that was measured in the same unit."""
        limit = self.found[of].value if of in self.found else None
        return Rate(name, value, unit, value / limit if limit else None, of if limit else "")


def _measures(lab: Lab) -> Iterator[tuple[str, Callable[[Rates, str], Rate]]]:
    if lab.on_gpu:
        yield "copy to the device", partial(_copy, False, True)
        yield "copy to the device, not page-locked", partial(_copy, False, False)
        yield "copy from the device", partial(_copy, True, True)
    else:
        yield "copy", partial(_copy, False, False)
    for each in ("float32", *(("tf32", "float16") if lab.on_gpu else ()), "bfloat16"):
        yield f"products in {each}", partial(_products, each)
    yield "stream", _stream
    precision: Precision = "bfloat16" if lab.on_gpu else "float32"
    yield f"sigmoid loss in {precision}", partial(_loss, precision)
    yield f"step in {precision}", partial(_step, precision)
    for name in (*encoders.PACKAGED, *encoders.PAPER):
        yield f"{name} in {precision}", partial(_extraction, name, precision)


def _copy(back: bool, pinned: bool, rates: Rates, name: str) -> Rate:
    here = torch.ones(rates.size.copied, dtype=torch.uint8, pin_memory=pinned)
    there = torch.empty_like(here, device=rates.lab.device)
    source, target = (there, here) if back else (here, there)
    seconds = rates.time(lambda: target.copy_(source, non_blocking=True))
    return rates.rate(name, len(here) / seconds / 1e9, "GB/s")


def _products(precision: str, rates: Rates, name: str) -> Rate:
    rows = rates.size.matrix
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    one, other = (torch.randn(rows, rows, device=rates.lab.device, dtype=dtype) for _ in range(2))
    with tf32_products(precision == "tf32"):
        seconds = rates.time(lambda: torch.mm(one, other))
    return rates.rate(name, 2 * rows**3 / seconds / 1e12, "TFLOP/s")


def _stream(rates: Rates, name: str) -> Rate:
    lab, size = rates.lab, rates.size
    path = fits.make_store(lab.folder, size.rows, size.image_dim, size.text_dim)
    pairs = open_pairs([path], list(fits.CAPTIONS))
    with ExitStack() as stack:
        rows = [each.usable() for each in pairs]
        stream = stack.enter_context(Stream(pairs, rows, batch_size=size.batch, seed=0, pin=lab.on_gpu))
        batches = stream.batches_on(lab.device)
        for _ in range(stream.batches_per_epoch):  # the checksums of the first epoch
            next(batches)
        seconds = rates.time(lambda: next(batches))
    limit = "copy to the device" if lab.on_gpu else "copy"
    return rates.rate(name, size.batch * stream.row_bytes / seconds / 1e9, "GB/s", limit)


def _loss(precision: Precision, rates: Rates, name: str) -> Rate:
    size, device = rates.size, rates.lab.device
    image_BE = F.normalize(torch.randn(size.batch, size.dim, device=device), dim=-1).requires_grad_()
    text_CBE = F.normalize(torch.randn(1, size.batch, size.dim, device=device), dim=-1).requires_grad_()
    log_scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (3.0, -10.0))

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total = sigmoid_loss(image_BE, text_CBE, log_scale, bias).total
        total.backward()  # type: ignore[no-untyped-call]

    flops = 3 * 2 * size.batch**2 * size.dim  # similarities, and the gradients of both sides
    return rates.rate(name, flops / rates.time(work) / 1e12, "TFLOP/s", f"products in {precision}")


def _step(precision: Precision, rates: Rates, name: str) -> Rate:
    size, device = rates.size, rates.lab.device
    model = Architecture("glu", size.image_dim, size.text_dim, size.dim).build().to(device)
    settings = FitSettings(steps=1, batch_size=size.batch)
    stepper = Stepper(model, sigmoid_loss, make_optimizer(model, settings), device, in_parts=True, precision=precision)
    shapes = (size.batch, size.image_dim), (CAPTIONS, size.batch, size.text_dim)
    batch = Batch(*(torch.randn(shape, device=device).half() for shape in shapes))
    seconds = rates.time(lambda: stepper.step(batch, 1e-5))
    flops = step_flops(model, settings, CAPTIONS)
    return rates.rate(name, flops / seconds / 1e12, "TFLOP/s", f"products in {precision}")


def _extraction(encoder: str, precision: Precision, rates: Rates, name: str) -> Rate:
    config = replace(encoders.known(encoder, rates.lab), precision=precision)
    loaded: Any = config.load(str(rates.lab.device))
    inputs = encoders.inputs_of(loaded, getattr(loaded, "batch_size", 0))
    inputs = inputs * (64 if rates.lab.on_gpu else 2) if isinstance(inputs, list) else inputs
    with FlopCounterMode(display=False) as counter:
        loaded.encode(inputs)
    seconds = rates.time(lambda: loaded.encode(inputs))
    flops = counter.get_total_flops()
    return rates.rate(name, flops / seconds / 1e12, "TFLOP/s", f"products in {precision}")
