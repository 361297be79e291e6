"""Does extraction cost more than decoding and encoding? Wall time of a run against both measured alone, in one process.

The pictures are scenes of the demo saved as JPEG, the encoder is the packaged EfficientNet-lite0. Prints medians of
`--repeats` runs and the ratio  run / (decode only + encode only), each of the two with every core busy.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sail_align.extract.encoders.load import load_image_encoder
from sail_align.extract.engine import extract
from sail_align.extract.sources.base import Part
from sail_align.extract.sources.demo import DemoSource
from sail_align.extract.sources.descriptions import TableSource as Table
from sail_align.extract.sources.table import TableSource
from sail_align.extract.store import Store


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=512)
    options.add_argument("--repeats", type=int, default=3)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), asked.images, asked.repeats)


def measure(root: Path, images: int, repeats: int) -> None:
    """Time run, decoding and encoding alternately, so that a noisy machine disturbs all three alike."""
    save_pictures(root, images)
    source = TableSource(Table(kind="table", files="table.csv", images=".", captions={"raw": "caption"}), root)
    samples = list(source.samples())
    encoder = load_image_encoder("efficientnet-lite0")

    def decode() -> list[torch.Tensor]:
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            return list(workers.map(lambda sample: encoder.preprocess(source.image(sample.image)), samples))

    pixels = torch.stack(decode())

    def encode() -> None:
        for batch in pixels.split(encoder.batch_size):
            encoder.encode(batch)

    def run(repeat: int) -> None:
        store = Store.create(
            root / f"{repeat}.zarr", dataset="bench", manifest={}, parts=[Part.of(samples)], captions=["raw"]
        )
        extract(store, source, image=encoder, text=None, captions=[], quiet=True)

    encode()
    times: dict[str, list[float]] = {"decode only": [], "encode only": [], "run": []}
    for repeat in range(repeats):
        times["decode only"].append(seconds(decode))
        times["encode only"].append(seconds(encode))
        times["run"].append(seconds(lambda repeat=repeat: run(repeat)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:12s} {median:7.2f} s  {images / median:7.1f} images/s")
    print(
        f"run / (decode only + encode only) = {medians['run'] / (medians['decode only'] + medians['encode only']):.3f}"
    )


def save_pictures(root: Path, images: int) -> None:
    """Write demo scenes as JPEG of a photo's size, and a table of them."""
    scenes = DemoSource("train")
    names = []
    for sample, _ in zip(scenes.samples(), range(images), strict=False):
        names.append(f"{len(names)}.jpg")
        scenes.image(sample.image).resize((500, 375)).save(root / names[-1], quality=90)
    (root / "table.csv").write_text("image,caption\n" + "".join(f"{name},a scene\n" for name in names))


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
