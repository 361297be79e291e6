"""Measure the overhead of an extraction against baselines in the same run, by turns.

1. Wall time of a run / (decoding alone + encoding alone), each using all cores. Goal: at most 1.10.
2. Writing and committing (in parallel with the encoding) / that run. Goal: at most 3 %.
3. Decoding in processes that write to shared memory / decoding in threads.
4. Rate of captions in batches of similar length / in the order of the data. Goal: at least 1.5.

The encoders are the packaged EfficientNet-lite0 and MiniLM-L6. Images and captions are the demo's by default.
`--photos` is a folder of images. `--captions` is a CSV with the columns image and caption and several rows per image;
all captions of an image joined make a long one. Prints medians of `--repeats` rounds.
"""

import argparse
import csv
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context, shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from sail_align.extract.data import Part
from sail_align.extract.encoders.catalogue import VISION
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.executor.run import extract
from sail_align.extract.sources.demo.source import DemoSource
from sail_align.extract.sources.images import read_image
from sail_align.extract.sources.table import TableConfig
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store
from sail_align.extract.system.memory import keep_freed_memory

IMAGE, TEXT = "efficientnet-lite0", "minilm-l6"
UNSORTED_BATCH = 64
CORES = os.cpu_count() or 1


def main() -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--photos", type=Path)
    options.add_argument("--captions", type=Path)
    options.add_argument("--images", type=int, default=512)
    options.add_argument("--texts", type=int, default=512)
    options.add_argument("--repeats", type=int, default=3)
    asked = options.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # as sail-extract sets it; torch is already imported
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        measure_images(Path(folder), asked.photos, asked.images, asked.repeats)
    measure_texts(
        real_captions(asked.captions, asked.texts) if asked.captions else demo_captions(asked.texts), asked.repeats
    )


def measure_images(root: Path, photos: Path | None, images: int, repeats: int) -> None:
    """Compare a run with its parts, and decoding in threads with decoding in processes."""
    folder = photos or save_pictures(root / "images", images)
    files = sorted(path for path in folder.resolve().iterdir() if path.is_file())[:images]
    (root / "table.csv").write_text("image,caption\n" + "".join(f"{path.name},words\n" for path in files))
    table = TableConfig(kind="table", files="table.csv", images=str(folder.resolve()), captions={"raw": "caption"})
    source = table.open(root)
    samples = list(source.samples())
    encoder = ImageEncoderConfig(IMAGE).load()
    pixels_BHWC = torch.stack([encoder.preprocess(source.image(sample.image)) for sample in samples])

    def encode() -> None:
        for batch in pixels_BHWC.split(encoder.batch_size):
            encoder.encode(batch)

    def run() -> None:
        store = Store.create(
            root / f"{time.monotonic_ns()}.zarr",
            dataset="bench",
            manifest={},
            parts=[Part.of(samples)],
            captions=["raw"],
            quiet=True,
        )
        extract(store, source, image=encoder, text=None, captions=[], quiet=True)

    with shared_decoders(files, encoder) as decode_in_processes, timed_writing() as writing:
        decode = partial(decode_in_threads, files, encoder)
        times = by_turns(
            {"decode, threads": decode, "decode, processes": decode_in_processes, "encode": encode, "run": run}, repeats
        )
    print(f"{len(files)} images of {folder if photos else 'the demo'}, {IMAGE}, {CORES} cores")
    show(times, len(files), "images")
    parts = [sum(pair) for pair in zip(times["decode, threads"], times["encode"], strict=True)]
    print(f"  run / (decode + encode)      {ratio(times['run'], parts):.3f}  (goal: at most 1.10)")
    print(f"  writing / run                {ratio(writing[-repeats:], times['run']):.3f}  (goal: at most 0.03)")
    print(f"  decode: processes / threads  {ratio(times['decode, processes'], times['decode, threads']):.3f}")


def measure_texts(texts: list[str], repeats: int) -> None:
    """Compare batches sorted by length with unsorted ones."""
    encoder = TextEncoderConfig(TEXT).load()
    folder = EncoderFiles.fetch(TextEncoderConfig(TEXT).entry.origin).path
    plain = partial(unsorted, AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval())
    times = by_turns({"unsorted": lambda: plain(texts), "sorted": lambda: encoder.encode(texts)}, repeats)
    lengths = [len(text.split()) for text in texts]
    print(f"{len(texts)} captions of {min(lengths)} to {max(lengths)} words, {TEXT}, {CORES} cores")
    show(times, len(texts), "texts")
    print(f"  rate sorted / unsorted       {ratio(times['unsorted'], times['sorted']):.2f}  (goal: at least 1.5)")


def unsorted(tokenizer: Any, model: Any, texts: list[str]) -> torch.Tensor:
    """Encode with transformers alone: batches in the order of the data, padded to their longest text."""
    features = []
    for start in range(0, len(texts), UNSORTED_BATCH):
        batch = texts[start : start + UNSORTED_BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden_BTD = model(**tokens).last_hidden_state
        mask_BT1 = tokens["attention_mask"][:, :, None]
        features.append((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    return torch.cat(features)


def decode_in_threads(files: list[Path], encoder: VisionEncoder) -> None:
    """Decode in threads into preallocated memory, as extraction does."""
    pixels = np.empty((len(files), encoder.size, encoder.size, 3), dtype=np.uint8)

    def decode(row: int) -> None:
        pixels[row] = encoder.preprocess(read_image(files[row])).numpy()

    with ThreadPoolExecutor(CORES) as workers:
        list(workers.map(decode, range(len(files))))


@contextmanager
def shared_decoders(files: list[Path], encoder: VisionEncoder) -> Iterator[Callable[[], object]]:
    """Yield a function that decodes in one process per core. The processes are started before."""
    rows, size = len(files), encoder.size
    memory = shared_memory.SharedMemory(create=True, size=rows * size * size * 3)
    work = partial(_decode_into, memory.name, size)
    try:
        with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as workers:
            list(workers.map(work, [0] * CORES, [files[0]] * CORES))
            yield lambda: list(workers.map(work, range(rows), files, chunksize=8))
    finally:
        memory.close()
        memory.unlink()


_attached: dict[str, shared_memory.SharedMemory] = {}
"""The shared memory of a decoding process, by name."""


def _decode_into(memory: str, size: int, row: int, file: Path) -> None:
    if memory not in _attached:
        _attached[memory] = shared_memory.SharedMemory(memory)
    place = np.ndarray((size, size, 3), np.uint8, _attached[memory].buf, row * size * size * 3)
    place[:] = np.asarray(VISION[IMAGE].preprocessing.resize_and_crop(read_image(file)))


@contextmanager
def timed_writing() -> Iterator[list[float]]:
    """Yield a list to which every write and commit of a shard appends its seconds."""
    taken: list[float] = []
    write = FeatureArray.write

    def timed(*arguments: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return write(*arguments, **more)
        finally:
            taken.append(time.perf_counter() - started)

    FeatureArray.write = timed  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        FeatureArray.write = write  # type: ignore[method-assign]


def by_turns(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each function in each round. They take turns, so that noise affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_:  # the first fills caches
                times[name].append(time.perf_counter() - started)
    return times


def show(times: dict[str, list[float]], items: int, unit: str) -> None:
    """Print medians and rates."""
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:18s} {median:7.2f} s  {items / median:7.1f} {unit}/s")


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median over rounds of the ratio of two times in one round."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def save_pictures(folder: Path, images: int) -> Path:
    """Write demo scenes as JPEGs of a photo's size."""
    folder.mkdir()
    scenes = DemoSource("train")
    for number, sample in enumerate(islice(scenes.samples(), images)):
        scenes.image(sample.image).resize((500, 375)).save(folder / f"{number}.jpg", quality=90)
    return folder


def demo_captions(texts: int) -> list[str]:
    """Return the demo's short and long captions in random order."""
    samples = islice(DemoSource("train").samples(), texts)
    return shuffled([caption for sample in samples for caption in sample.captions.values()], texts)


def real_captions(file: Path, texts: int) -> list[str]:
    """Return the first caption of each image, and all its captions joined, in random order."""
    images: dict[str, list[str]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            images.setdefault(row["image"], []).append(row["caption"])
    return shuffled([text for group in images.values() for text in (group[0], " ".join(group))], texts)


def shuffled(texts: list[str], kept: int) -> list[str]:
    """Return up to `kept` texts in a reproducible random order."""
    return random.Random(0).sample(texts, min(kept, len(texts)))


if __name__ == "__main__":
    main()
