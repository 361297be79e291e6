"""Latency of `sail-align search` against its text encoder, exact search in large matrices, and memory.

Example:
    python benchmarks/search.py --rows 100000

A synthetic store of `--rows` images and a run of random heads to 256 dimensions with a bank are searched with captions
that were not searched before. The time from the query to the results is compared with that of the text encoder alone,
in turns. Then matrices of `--matrix` vectors are searched exactly, and compared with one float32 product of the same
size, and with faiss where it is installed. Memory is that of this process, beyond what it has with the encoder loaded.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from sail_align.align.model.alignment import Architecture
from sail_align.align.model.correction import Bank
from sail_align.align.runs.checkpoint import Run
from sail_align.align.search.index import SearchIndex
from sail_align.align.search.matrix import Matrix
from sail_align.align.search.query import Term
from sail_align.extract.data import Part, Sample
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import TextEncoderConfig
from sail_align.extract.store.store import Store

DIM, FEATURES, BANK, RESULTS = 256, 64, 4_096, 20
SENTENCE = "a the two dog cat man woman child runs jumps sits on in under with snow grass beach street red blue"
WORDS = SENTENCE.split(" ")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--matrix", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--text-encoder", default="minilm-l6")
    parser.add_argument("--queries", type=int, default=40)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        report_index(Path(name), given.rows, given.text_encoder, given.queries)
    for count in given.matrix:
        report_matrix(count)


def report_index(folder: Path, rows: int, text_encoder: str, queries: int) -> None:
    """Print the latency of a whole query, and memory."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 9)) for _ in range(rows)]
    image = Identity.imported("image", "0" * 64, "float16", FEATURES)
    store = make_store(folder / "store.zarr", image, texts)
    run = make_run(folder / "run", image, TextEncoderConfig(text_encoder).load().identity)
    start = time.perf_counter()
    index = SearchIndex.open(run, [Store.open(store)])
    encoder = index.encoders.text
    loaded = time.perf_counter() - start
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    index.build("corrected")
    built = time.perf_counter() - start
    words = [[" ".join(random.choice(WORDS, 9)) for _ in range(queries)] for _ in range(2)]
    alone, whole = [], []
    for first, second in zip(*words, strict=True):
        alone.append(seconds(lambda first=first: encoder.encode([first])))
        whole.append(seconds(lambda second=second: index.search([Term(second, "text")], RESULTS)))
    memory = psutil.Process().memory_info().rss - before
    again = SearchIndex.open(run, [Store.open(store)])
    start = time.perf_counter()
    again.build("corrected")
    reopened = time.perf_counter() - start
    own, total, slowest = 1e3 * np.median(alone), 1e3 * np.median(whole), 1e3 * np.quantile(whole, 0.9)
    print(
        f"{rows:,} rows × {DIM}: encoders loaded in {loaded:.2f} s, index built in {built:.2f} s, opened again in "
        f"{reopened:.2f} s\n"
        f"  text encoder alone {own:.1f} ms, query to {RESULTS} results {total:.1f} ms (90 % below "
        f"{slowest:.1f} ms): ratio {total / own:.2f}\n"
        f"  memory: {memory / 1e6:.0f} MB, of which the matrix {rows * DIM * 2 / 1e6:.0f} MB; peak of the process "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )


def make_store(path: Path, image: Identity, texts: Sequence[str]) -> Path:
    """Write a store of random image features with captions."""
    samples = [Sample(f"{row:08d}.jpg", f"{row:08d}.jpg", {"raw": text}) for row, text in enumerate(texts)]
    store = Store.create(path, dataset="random", manifest={}, parts=[Part.of(samples)], captions=["raw"], quiet=True)
    array = store.add(image)
    random = np.random.default_rng(1)
    for shard in array.shards:
        start, stop = array.span(shard)
        features = random.normal(size=(stop - start, FEATURES)).astype(np.float16)
        array.write(shard, features, np.zeros(stop - start, np.uint8))
    return path


def make_run(folder: Path, image: Identity, text: Identity) -> Run:
    """Return a run of random heads with a bank."""
    architecture = Architecture("linear", FEATURES, text.spec.dim, DIM, bank_rows=BANK)
    torch.manual_seed(0)
    model = architecture.build().eval()
    bank = model.correction
    if isinstance(bank, Bank):
        with torch.no_grad():
            bank.fill(torch.randn(BANK, DIM), torch.randn(BANK, DIM))
    folder.mkdir()
    return Run(folder, model, image, text, {}, "0" * 64, architecture=asdict(architecture))


def report_matrix(count: int) -> None:
    """Print the time of exact search in a matrix, against one float32 product and faiss."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.empty(count, DIM, dtype=torch.float16).split(65_536)
    for block in blocks:
        block.copy_(F.normalize(torch.randn(block.shape, generator=generator), dim=1))
    vectors_ME = blocks[0]._base
    query_E = F.normalize(torch.randn(DIM, generator=generator), dim=0)
    matrix = Matrix([vectors_ME])
    whole_ME = vectors_ME.float()
    cases: dict[str, Callable[[], object]] = {
        "exact, float16": lambda: matrix.search(query_E, RESULTS),
        "one float32 product (twice the memory)": lambda: torch.mv(whole_ME, query_E).topk(RESULTS),
    }
    if find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        flat.add(whole_ME.numpy())
        cases["faiss, flat float16"] = lambda: flat.search(query_E[None].numpy(), RESULTS)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(8):
        for name, case in cases.items():
            taken = seconds(case)
            if turn:
                times[name].append(taken)
    print(f"{count:,} × {DIM}: " + ", ".join(f"{name} {1e3 * np.median(each):.0f} ms" for name, each in times.items()))


def seconds(case: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
