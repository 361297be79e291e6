"""Compare the reading speed of a fit's stream with what the machine can do, as medians over fresh processes in turn.

Example:
    python benchmarks/stream.py --rows 200000

Creates a synthetic store of 2,048 + 2 × 1,024 dimensions in a temporary folder, and plain files with the same features.
Measures

- warm, with all files in the page cache: the stream against `np.memmap` of the plain files, read in blocks in random
  order or row by row in the order of the stream, and against zarr-python reading the store's chunks in random order.
  All use the same number of threads and of reused batches;
- each of these in the first pass of a process, while the system allocates the batches and maps the files page by page,
  and in later passes;
- cold, after dropping the page cache with fadvise: the stream against `readinto` of the store's files in turn;
- the time from constructing a stream to its first batch, and the private memory while reading;
- what comparing features with their checksums costs: the stream with `--verify off`, `first-epoch` (as above) and
  `always`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from sail_align.extract.data import Part, Sample
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.store.store import Store

DIMS = {"image": 2_048, "raw": 1_024, "long": 1_024}
ROW_BYTES = 2 * sum(DIMS.values())
EPOCHS = 10
BLOCK_ROWS = 1_024
BUFFERS = 3


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=36_864)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="folder to create the store in and to keep; a temporary one by default"
    )
    parser.add_argument(
        "--only", choices=MEASURES, action="append", help="measure only these and print no goals; may be repeated"
    )
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        epochs = 1 if given.measure.endswith("cold") else EPOCHS
        print(json.dumps(MEASURES[given.measure](given.folder, given.batch_size, epochs)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "plain").exists():
            make(folder, given.rows)
        report(folder, given.batch_size, given.rounds, given.only or list(MEASURES))


def report(folder: Path, batch_size: int, rounds: int, names: list[str]) -> None:
    """Run each measurement in processes of its own, in turn, and print rates, ratios and goals."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            drop(folder)
            if not name.endswith("cold"):
                warm(folder)
            command = [sys.executable, __file__, "--measure", name, "--folder", folder, "--batch-size", batch_size]
            output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(output))
    middle = {name: {key: median(each[key] for each in all_) for key in all_[0]} for name, all_ in found.items()}
    batch = batch_size * ROW_BYTES / 1e9
    print(f"a batch of {batch_size:,} pairs is {batch:.2f} GB")
    for name, values in middle.items():
        later = f", later {values['later']:.2f}" if "later" in values else ""
        print(f"{name:12s} {values['first']:.2f} GB/s in the first pass{later}")
    if len(names) < len(MEASURES):
        return
    streamed, cold = middle["stream"], middle["stream cold"]
    bound = BUFFERS * batch + 0.1
    lines = [
        *(
            (f"warm, {pass_} pass: stream / memmap in blocks", streamed[pass_] / middle["memmap"][pass_], ">=", 0.9)
            for pass_ in ("first", "later")
        ),
        ("warm: stream / zarr-python", streamed["later"] / middle["zarr"]["later"], ">=", 4),
        ("cold: stream / readinto", cold["first"] / middle["files cold"]["first"], ">=", 1),
        ("warm: seconds to the first batch", streamed["wait"], "<=", 1),
        ("cold: seconds to the first batch", cold["wait"], "<=", 1),
        (f"private memory in GB, {BUFFERS} batches + 0.1 = {bound:.2f}", streamed["private"], "<=", bound),
    ]
    for pass_ in ("first", "later"):
        print(f"warm, {pass_} pass: stream / memmap by rows {streamed[pass_] / middle['memmap rows'][pass_]:.2f}")
    seconds = {name: batch / middle[name]["later"] for name in ("stream off", "stream always")}
    print(f"checksums: stream / without, first pass {streamed['first'] / middle['stream off']['first']:.2f}, ", end="")
    print(f"later {streamed['later'] / middle['stream off']['later']:.2f}; in every epoch, ", end="")
    print(f"later {seconds['stream off'] / seconds['stream always']:.2f}: ", end="")
    print(f"{seconds['stream always'] - seconds['stream off']:.3f} s more per batch")
    for what, value, sign, goal in lines:
        met = value >= goal if sign == ">=" else value <= goal
        print(f"{what}: {value:.2f} (goal {sign} {goal:.3g}: {'met' if met else 'missed'})")


def stream(folder: Path, batch_size: int, epochs: int, verify: Any = "first-epoch") -> dict[str, float]:
    """Read epochs through the stream."""
    from sail_align.align.data.loader import Stream
    from sail_align.align.data.pairs import open_pairs

    pairs = open_pairs([folder / "store.zarr"], ["raw", "long"], verify=verify)
    rows = [each.usable() for each in pairs]
    private = most = rss_anon()
    begun = time.perf_counter()
    with Stream(pairs, rows, batch_size=batch_size, seed=0) as source:
        batches = source.batches()
        times = [begun]
        for _ in range(epochs * source.batches_per_epoch):
            next(batches)
            times.append(time.perf_counter())
            most = max(most, rss_anon())
    return rates(times, batch_size, epochs) | {"wait": times[1] - begun, "private": (most - private) / 1e9}


def memmap(folder: Path, batch_size: int, epochs: int) -> dict[str, float]:
    """Copy blocks of the plain files in random order to batches, with the stream's number of threads."""
    from sail_align.align.data.loader import GATHER_THREADS

    arrays = [np.load(folder / "plain" / f"{name}.npy", mmap_mode="r") for name in DIMS]
    return in_blocks(arrays, batch_size, epochs, GATHER_THREADS)


def memmap_rows(folder: Path, batch_size: int, epochs: int) -> dict[str, float]:
    """Copy the rows that the stream serves from the plain files: the same work without a store."""
    from sail_align.align.data.loader import BUFFER_ROWS, GATHER_THREADS
    from sail_align.align.data.sampler import Order, StreamState

    arrays = [np.load(folder / "plain" / f"{name}.npy", mmap_mode="r") for name in DIMS]
    counts = np.diff([*range(0, len(arrays[0]), BLOCK_ROWS), len(arrays[0])])
    order = Order(counts, batch_size=batch_size, seed=0, buffer_rows=BUFFER_ROWS)
    state, times = StreamState(), [time.perf_counter()]
    batches = allocate(batch_size)
    with ThreadPoolExecutor(GATHER_THREADS) as pool:
        for number in range(epochs * order.batches_per_epoch):
            numbers, batch = order.batch(state), batches[number % BUFFERS]

            def copy(part: slice, numbers: Any = numbers, batch: list[Any] = batch) -> None:
                for array, out in zip(arrays, batch, strict=True):
                    np.take(array, numbers[part], axis=0, out=out[part], mode="clip")

            list(pool.map(copy, (slice(at, at + BLOCK_ROWS) for at in range(0, batch_size, BLOCK_ROWS))))
            times.append(time.perf_counter())
            state = order.following(state)
    return rates(times, batch_size, epochs)


def with_zarr(folder: Path, batch_size: int, epochs: int) -> dict[str, float]:
    """Read the store's chunks in random order through zarr-python, with the stream's number of threads."""
    import zarr

    from sail_align.align.data.loader import GATHER_THREADS

    store = folder / "store.zarr"
    patterns = ["image/*/features", "text/*/raw/features", "text/*/long/features"]
    arrays = [zarr.open_array(next(store.glob(pattern)), mode="r") for pattern in patterns]
    return in_blocks(arrays, batch_size, epochs, GATHER_THREADS)


def in_blocks(arrays: list[Any], batch_size: int, epochs: int, threads: int) -> dict[str, float]:
    """Return the GB/s of copying epochs of the arrays, in random blocks, to batches that are reused in turn."""
    rows = arrays[0].shape[0]
    times = [time.perf_counter()]
    batches = allocate(batch_size)
    per_batch = batch_size // BLOCK_ROWS

    def copy(number: int, place: int, block: int) -> None:
        for array, out in zip(arrays, batches[number % BUFFERS], strict=True):
            out[place * BLOCK_ROWS : (place + 1) * BLOCK_ROWS] = array[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]

    with ThreadPoolExecutor(threads) as pool:
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(rows // BLOCK_ROWS).tolist()
            for start in range(0, len(order) - per_batch + 1, per_batch):
                blocks = order[start : start + per_batch]
                list(pool.map(copy, repeat(len(times)), range(per_batch), blocks))
                times.append(time.perf_counter())
    return rates(times, batch_size, epochs)


def allocate(batch_size: int) -> list[list[Any]]:
    """Return the batches to fill in turn, allocated like the stream's: the system provides the memory on first use."""
    return [
        [torch.empty((batch_size, dim), dtype=torch.float16).numpy() for dim in DIMS.values()] for _ in range(BUFFERS)
    ]


def rates(times: list[float], batch_size: int, epochs: int) -> dict[str, float]:
    """Return the GB/s of the first pass and of later ones, given the times of the start and of each batch."""
    per_epoch = (len(times) - 1) // epochs
    passes = {"first": times[: per_epoch + 1], "later": times[per_epoch:]}
    return {
        name: (len(part) - 1) * batch_size * ROW_BYTES / (part[-1] - part[0]) / 1e9
        for name, part in passes.items()
        if len(part) > 1
    }


def files_cold(folder: Path, batch_size: int, epochs: int) -> dict[str, float]:
    """Read the store's feature files in turn into one buffer."""
    buffer = bytearray(8 << 20)
    begun = time.perf_counter()
    size = 0
    for path in store_files(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return {"first": size / (time.perf_counter() - begun) / 1e9}


MEASURES: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    "stream": stream,
    "stream off": partial(stream, verify="off"),
    "stream always": partial(stream, verify="always"),
    "memmap": memmap,
    "memmap rows": memmap_rows,
    "zarr": with_zarr,
    "stream cold": stream,
    "files cold": files_cold,
}


def make(folder: Path, rows: int) -> None:
    """Create the store and plain files with the same features."""
    (folder / "plain").mkdir(parents=True)
    samples = [Sample(f"{row:09d}", f"{row}.jpg", {"raw": "…", "long": "…"}) for row in range(rows)]
    store = Store.create(
        folder / "store.zarr",
        dataset="synthetic",
        manifest={},
        parts=[Part.of(samples)],
        captions=["raw", "long"],
        shard_rows=65_536,
        chunk_rows=1_024,
        quiet=True,
    )
    random = np.random.default_rng(0)
    for name, dim in DIMS.items():
        modality: Literal["image", "text"] = "image" if name == "image" else "text"
        spec = EncoderSpec(f"noise-{modality}", modality, {}, "", {}, "none", "float32", dim)
        identity = Identity(spec, [1.0], {})
        array = store.add(identity) if name == "image" else store.add(identity, name)
        plain = np.lib.format.open_memmap(folder / "plain" / f"{name}.npy", "w+", np.float16, (rows, dim))
        for shard in array.shards:
            start, stop = array.span(shard)
            features = random.standard_normal((stop - start, dim), np.float32).astype(np.float16)
            array.write(shard, features, np.zeros(stop - start, np.uint8))
            plain[start:stop] = features
        plain.flush()


def store_files(folder: Path) -> Iterator[Path]:
    """Yield the files with the store's features."""
    yield from sorted((folder / "store.zarr").glob("**/features/c/*/0"))


def all_files(folder: Path) -> list[Path]:
    """Return the files of the store and the plain files."""
    return [*store_files(folder), *(folder / "plain").iterdir()]


def warm(folder: Path) -> None:
    """Read all files into the page cache sequentially, so that the system uses large pages."""
    for path in all_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def drop(folder: Path) -> None:
    """Drop all files from the page cache."""
    for path in all_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rss_anon() -> int:
    """Return this process's private memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
