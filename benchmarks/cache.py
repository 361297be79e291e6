"""Compare training steps whose features are on the device, in memory, or in the store (`sail-align fit --cache`).

Creates a synthetic store of 2,048 + 2 × 1,024 dimensions, in the page cache. Prints, as medians over rounds in which
the candidates take turns in one process:

- steps per second, and the time of a step divided by that of steps on one batch that is already on the device;
- batches per second without any step.

    python benchmarks/cache.py                                          # B = 4,096, linear heads
    python benchmarks/cache.py --head glu --rows 2200000 --device cuda  # a GPU with the paper's heads
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from stream import DIMS, make, warm

from sail_align.align.data.cache import Cache
from sail_align.align.data.loader import Batch, Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import sigmoid_loss
from sail_align.align.settings import FitSettings
from sail_align.align.train.step import Stepper, make_optimizer


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_960)
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--head", choices=("linear", "glu"), default="linear")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="folder to create the store in and to keep")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "plain").exists():
            make(folder, options.rows)
        warm(folder)
        report(folder, options)


def report(folder: Path, options: argparse.Namespace) -> None:
    """Measure all candidates in turn, and print the medians."""
    device = torch.device(options.device)
    pairs = open_pairs([folder / "store.zarr"], ["raw", "long"])
    step = stepper(options, device)
    on_gpu = device.type == "cuda"
    with Stream(pairs, [each.usable() for each in pairs], batch_size=options.batch, seed=0, pin=on_gpu) as stream:
        started = time.perf_counter()
        caches = {"device": Cache(stream, device, quiet=False), "host": Cache(stream, None, quiet=False)}
        print(f"loaded twice in {time.perf_counter() - started:.1f} s, {Cache.bytes_of(stream) / 1e9:.2f} GB each")
        one, _ = next(caches["device"].batches_on(device))
        sources: dict[str, Iterator[Any]] = {name: each.batches_on(device) for name, each in caches.items()}
        sources |= {"none": stream.batches_on(device), "one batch": repeat((one, None))}
        steps: dict[str, list[float]] = {name: [] for name in sources}
        bare: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(options.rounds):
            for name, source in sources.items():
                steps[name].append(seconds(source, options.steps, lambda batch: float(step.step(batch, 1e-5).total)))
                bare[name].append(seconds(source, options.steps, lambda _: on_gpu and torch.cuda.synchronize()))
        for cache in caches.values():
            cache.close()
    alone = median(steps["one batch"])
    print(f"B = {options.batch:,}, {options.head} heads, {options.precision} on {device}")
    for name in sources:
        line = f"{name:<10} {1 / median(steps[name]):7.3f} steps/s, step / one batch {median(steps[name]) / alone:5.3f}"
        print(line + ("" if name == "one batch" else f" {1 / median(bare[name]):8.1f} batches/s without steps"))
    ratios = [none / cached for none, cached in zip(steps["none"], steps["device"], strict=True)]
    print(f"steps per second, device / none: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def stepper(options: argparse.Namespace, device: torch.device) -> Stepper:
    """Return the steps of a fit with the paper's dimensions."""
    model = Architecture(options.head, DIMS["image"], DIMS["raw"], 1_024, 4).build().to(device)
    optimizer = make_optimizer(model, FitSettings(steps=1))
    return Stepper(model, sigmoid_loss, optimizer, device, True, precision=options.precision)


def seconds(source: Iterator[Any], count: int, use: Callable[[Batch], object]) -> float:
    """Return the mean seconds per batch of a few batches, after two that fill what is prepared in advance."""
    for batch, _ in islice(source, 2):
        use(batch)
    started = time.perf_counter()
    for batch, _ in islice(source, count):
        use(batch)
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
