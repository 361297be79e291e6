"""Time and peak memory of building an index, reading it, and joining captions to it by URL.

Building is compared with a plain pyarrow write of the same rows, and the join with one query in DuckDB if that is
installed. The samples are synthetic: keys, image locations, URLs and captions of 80 characters. Every step runs in its
own process, so that peak memories are separate. `--rows 12900000` is the size of CC12M; the default is quick.

`--many 400000000` also opens a store of so many rows. Its files are hard links of those of one shard, so that it needs
little disk.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sail_align import open_store
from sail_align.align.data.pairs import Pairs
from sail_align.extract.data import CaptionTables, Part, Sample
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.executor.encode import ArrayTask
from sail_align.extract.executor.worker import Share, Worker
from sail_align.extract.store.build_index import _require_unique_keys
from sail_align.extract.store.hierarchy import write_root
from sail_align.extract.store.index import FILE_ROWS, GROUP_ROWS, Index
from sail_align.extract.store.recaptions import RecaptionReport, join_captions
from sail_align.extract.store.store import Store

TAR_ROWS = 10_000
CAPTIONS = {"long": "longSV_captions", "short": "shortSV_captions"}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--many", type=int, default=10_000_000, help="rows of a store of hard links; 0: none")
    options.add_argument("--folder", help="where to write; by default a temporary folder")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder, rows = Path(name), asked.rows
        imports = in_a_process(time.time)[2]
        if asked.many:
            report_many(folder / "many", asked.many)
        print(f"{rows:,} rows; a process that only imports the package: {imports:.2f} GB", flush=True)
        plain = shown("plain pyarrow write", rows, partial(write_plainly, folder, rows))
        built = shown("build the index", rows, partial(build, folder / "index.zarr", rows))
        print(f"build / plain write = {built / plain:.2f}", flush=True)
        shown("open, read a shard", min(rows, FILE_ROWS), partial(read, folder / "index.zarr"))
        in_a_process(partial(write_recaptions, folder / "recaptions.csv", rows))
        gigabytes = (folder / "recaptions.csv").stat().st_size / 1e9
        table = folder / "recaptions.csv"
        if find_spec("duckdb"):
            duckdb = shown("join in DuckDB", rows, partial(join_in_duckdb, folder, rows, table))
        joined = shown("join captions by URL", rows, partial(join, folder / "index.zarr", table))
        if find_spec("duckdb"):
            print(f"join / join in DuckDB = {joined / duckdb:.2f}", flush=True)
        print(f"join / build = {joined / built:.2f}, {gigabytes:.1f} GB of captions", flush=True)
        print("\n".join(RecaptionReport.read(folder / "index.zarr" / "index").lines()))  # type: ignore[union-attr]


def report_many(folder: Path, rows: int) -> None:
    """Make a store of hard links and measure what opens it."""
    seconds, size, _ = in_a_process(partial(link_store, folder, rows))
    print(f"{rows:,} rows of hard links: made in {seconds:.0f} s, {size / 1e9:.2f} GB of disk", flush=True)
    path = folder / "many.zarr"
    for what, work in {
        "open, read a shard": partial(read_last, path),
        "a row by number": partial(read_row, path),
        "a worker's start": partial(start_worker, path),
        "status": partial(status, path),
        "open as fit does": partial(open_pairs, path),
        "are keys unique?": partial(compare_keys, path),
    }.items():
        shown(what, rows, work)


def shown(what: str, rows: int, work: Callable[[], object]) -> float:
    """Print one step's time, rate and peak memory; return its seconds."""
    seconds, _, gigabytes = in_a_process(work)
    print(f"{what:20s} {seconds:8.1f} s  {rows / seconds:10,.0f} rows/s  peak {gigabytes:.2f} GB", flush=True)
    return seconds


def in_a_process(work: Callable[[], object]) -> tuple[float, object, float]:
    """Return the seconds that work took, its result, and the peak memory of the process it ran in, in GB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, work).result()


def measured(work: Callable[[], object]) -> tuple[float, object, float]:
    """Run in the process: see `in_a_process`."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def samples_of(start: int, stop: int) -> Iterator[Sample]:
    """Yield rows start … stop − 1."""
    for row in range(start, stop):
        yield Sample(
            key=f"{row // TAR_ROWS:05d}/{row:09d}",
            image=f"{row // TAR_ROWS:05d}.tar:{row * 30_000}:29000",
            captions={"raw": f"a caption of picture {row} ".ljust(80, "x")},
            url=url(row),
        )


def url(row: int) -> str:
    """Return a URL of 80 characters."""
    return f"https://images{row % 977}.example.org/{row * 2_654_435_761 % 2**32:08x}/{row}".ljust(76, "p") + ".jpg"


def words(row: int, length: int) -> str:
    """Return pseudo-random text, which compresses about as real captions do."""
    start = row * 7_919 % (len(TEXT) - length)
    return TEXT[start : start + length]


TEXT = " ".join(f"{number:x}" for number in np.random.default_rng(0).integers(0, 50_000, 300_000))


def write_plainly(folder: Path, rows: int) -> None:
    """Write the same table in the same files, from the same Python objects, and nothing besides."""
    for start in range(0, rows, FILE_ROWS):
        writer = None
        for group in range(start, min(start + FILE_ROWS, rows), GROUP_ROWS):
            table = Index.table(list(samples_of(group, min(group + GROUP_ROWS, start + FILE_ROWS, rows))), ["raw"])
            writer = writer or pq.ParquetWriter(folder / "plain.parquet", table.schema, compression="zstd")
            writer.write_table(table)
        if writer:
            writer.close()


def build(path: Path, rows: int) -> None:
    """Build the index of a store, of one part a tar."""
    starts = range(0, rows, TAR_ROWS)
    parts = [Part(f"{start}", partial(samples_of, start, min(start + TAR_ROWS, rows))) for start in starts]
    Store.create(path, dataset="bench", manifest={}, parts=parts, captions=["raw"], quiet=True)


def read(path: Path) -> None:
    """Open a store and read one shard's samples."""
    store = Store.open(path)
    store.samples(0, min(store.shard_rows, store.rows))


def link_store(folder: Path, rows: int) -> int:
    """Make a complete store of one shard, and one of many shards whose files are hard links of it.

    Returns the bytes on disk.
    """
    part = Part("0", partial(samples_of, 0, FILE_ROWS))
    one = Store.create(
        folder / "one.zarr",
        dataset="bench",
        manifest={},
        parts=[part],
        captions=["raw"],
        shard_rows=FILE_ROWS,
        quiet=True,
    )
    path, files = folder / "many.zarr", -(-rows // FILE_ROWS)
    (path / "index").mkdir(parents=True)
    attributes = {**one.attributes, "rows": files * FILE_ROWS, "index_sha256": one.index_files.digests * files}
    write_root(path, attributes, {})
    for number in range(files):
        os.link(one.index_files.file(0), path / "index" / f"part-{number:05d}.parquet")
    many = Store.open(path)
    noise = np.random.default_rng(0).standard_normal((FILE_ROWS, 8)).astype(np.float16)
    for modality, caption in (("image", ""), ("text", "raw")):
        spec = EncoderSpec(f"noise-{modality}", modality, {}, "", {}, "none", "float32", 8)  # type: ignore[arg-type]
        array = many.add(Identity(spec, [1.0], {}), caption)
        array.write(0, noise, np.zeros(FILE_ROWS, np.uint8))
        content = {name: array.markers[0][name] for name in ("counts", "sha256", "crc32c")}
        for shard in array.shards[1:]:
            for stored in array._arrays.values():
                file = stored.shard_file(shard)
                file.parent.mkdir(exist_ok=True)
                os.link(stored.shard_file(0), file)
            array._commits.write(shard, array.span(shard), content)
    return sum(file.stat().st_size // file.stat().st_nlink for file in folder.rglob("*") if file.is_file())


def read_last(path: Path) -> None:
    """Open a store and read the samples and the features of its last shard."""
    store = Store.open(path)
    array = store.image()
    start, stop = array.span(array.shards[-1])
    store.samples(start, stop)
    array.read(start, stop)


def read_row(path: Path) -> None:
    """Read one row with its features, as a notebook does."""
    _ = open_store(path)[-1]


def start_worker(path: Path) -> None:
    """Look for the shards that are left, as a worker does when it starts."""
    store = Store.open(path)
    tasks = [ArrayTask((array,), lambda rows, advance: []) for array in store.arrays()]
    if Worker(store, tasks, lambda event: None, Share()).pending():
        raise ValueError("shards are left")


def status(path: Path) -> None:
    """Count the rows by status and compute the store's digest."""
    Store.open(path).to_dict()


def open_pairs(path: Path) -> None:
    """Open the pairs and find the usable rows, as a fit does."""
    pairs = Pairs.open(path, ["raw"])
    pairs.require_complete()
    pairs.usable()
    _ = pairs.store.digest_of(pairs.arrays)


def compare_keys(path: Path) -> None:
    """Compare the keys of all rows, as when the index is built. The hard links' are made distinct."""
    files = len(Store.open(path).index_files.digests)
    _require_unique_keys(_Distinct(path / "index"), files)


class _Distinct(Index):
    def columns(self, name: str, files: int) -> Iterator[list[Any]]:
        for number, keys in enumerate(super().columns(name, files)):
            yield [f"{key}/{number}" for key in keys]


def join(path: Path, table: Path) -> None:
    """Join captions to the index of a store, as `Store.create` does once the samples are written."""
    tables = CaptionTables((table,), "url", "Image Path", CAPTIONS)
    rows = Store.open(path).rows
    join_captions(path / "index", -(-rows // FILE_ROWS), rows, ["raw"], tables, quiet=True)


def join_in_duckdb(folder: Path, rows: int, table: Path) -> None:
    """Join the same captions in DuckDB, and write the rows in their order to one parquet file.

    The first row of each URL counts. Unlike the project's own join, this stops at bytes that are not UTF-8, counts
    nothing, and writes other files.
    """
    import duckdb

    parts = [str(path) for path in sorted((folder / "index.zarr" / "index").glob("*.parquet"))]
    columns = dict.fromkeys(("Image Path", *CAPTIONS.values()), "VARCHAR")
    dialect = "auto_detect=false, delim=',', quote='\"', escape='\"', header=true, new_line='\\n', strict_mode=true"
    config = {"memory_limit": "500MB", "threads": 2, "temp_directory": str(folder / "duckdb")}
    with duckdb.connect(str(folder / "join.duckdb"), config=config) as database:
        database.execute(
            f"CREATE TABLE captions AS SELECT *, row_number() OVER () AS number FROM read_csv('{table}', {dialect}, "
            f"columns={columns})"
        )
        database.execute(
            f"""COPY (
                WITH first AS (
                    SELECT sample.file_index, sample.file_row_number, min(number) AS number
                    FROM read_parquet({parts}, file_row_number=true) sample
                    JOIN captions ON url = "Image Path"
                    GROUP BY ALL
                )
                SELECT sample.*, captions.*
                FROM read_parquet({parts}, file_row_number=true) sample
                LEFT JOIN first USING (file_index, file_row_number)
                LEFT JOIN captions USING (number)
                ORDER BY file_index, file_row_number
            ) TO '{folder / "joined.parquet"}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {GROUP_ROWS})"""
        )
    joined = pq.ParquetFile(folder / "joined.parquet").metadata.num_rows
    if joined != rows:
        raise ValueError(f"joined {joined} rows, expected {rows}")


def write_recaptions(path: Path, rows: int) -> None:
    """Write DreamLIP-form captions of nine in ten images, and of as many others, in another order."""
    order = np.random.default_rng(0).permutation(rows)
    schema = pa.schema([(name, pa.string()) for name in ("Image Path", *CAPTIONS.values())])
    with pa.csv.CSVWriter(path, schema) as writer:
        for start in range(0, rows, FILE_ROWS):
            numbers = [int(row) + (rows if row % 10 == 0 else 0) for row in order[start : start + FILE_ROWS]]
            columns = [
                [url(row) for row in numbers],
                [f"A long description of picture {row}, {words(row, 460)}" for row in numbers],
                [f"A short one of {row}, {words(row, 60)}" for row in numbers],
            ]
            writer.write_table(pa.table(columns, schema=schema))


if __name__ == "__main__":
    main()
