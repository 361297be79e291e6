"""Count the requests of an extraction to a store on S3, by price class, for 1, 2 and 4 workers that share it.

An S3 server (moto) in this process counts them. The encoder returns zeros at once. Writes and listings (PUT, POST,
LIST) cost more than reads (GET, HEAD) on all object storage; deletions are free.
"""

import argparse
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from sail_align.extract.data import Part, Sample
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.executor.encode import ArrayTask, EncodedRows
from sail_align.extract.executor.worker import Share, Worker
from sail_align.extract.store.store import Store

ROWS = 8
"""Rows of a shard."""


class Server:
    """An S3 server in a thread, which answers one request at a time and counts them by class."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._app, self._lock = DomainDispatcherApplication(create_backend_app), threading.Lock()
        http = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{http.port}"
        threading.Thread(target=http.serve_forever, daemon=True).start()

    def _answer(self, request: dict[str, Any], respond: Any) -> list[bytes]:
        method, query = request["REQUEST_METHOD"], parse_qs(request["QUERY_STRING"], keep_blank_values=True)
        if method == "POST" and "delete" in query:
            method = "DELETE"
        listing = method == "GET" and "list-type" in query
        kind = "write" if listing or method in ("PUT", "POST") else "read" if method in ("GET", "HEAD") else "delete"
        with self._lock:
            self.counts[kind] += 1
            return list(self._app(request, respond))


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        """Print nothing."""


def extract(url: str, shards: int, workers: int) -> None:
    """Fill a new store with one array."""
    parts = [Part.of([Sample(key=f"{row}", image="", captions={"raw": "x"}) for row in range(ROWS * shards)])]
    Store.create(url, dataset="x", manifest={}, parts=parts, captions=["raw"], shard_rows=ROWS, quiet=True)
    spec = EncoderSpec("zeros", "text", {}, "0" * 64, {}, "mean", "float32", 4)
    barrier = threading.Barrier(workers)

    def work(_: int) -> None:
        store = Store.open(url)
        array = store.add(Identity(spec, [1.0], {}), "raw")

        def encode(rows: Any, advance: Any) -> list[EncodedRows]:
            store.index(["caption.raw"], rows[0], rows[-1] + 1)
            return [EncodedRows(np.zeros((len(rows), 4), np.float16), np.zeros(len(rows), np.uint8))]

        worker = Worker(store, [ArrayTask((array,), encode)], lambda event: None, Share())
        barrier.wait()
        worker.run()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    shards = parser.parse_args().shards
    torch.set_num_threads(1)
    server = Server()
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    os.environ.update(zip(names, (server.url, "test", "test", "us-east-1"), strict=True))
    import s3fs

    s3fs.S3FileSystem().mkdir("features")
    print("| workers | PUT, POST, LIST a shard | GET, HEAD a shard | DELETE a shard |\n|---|---|---|---|")
    for workers in (1, 2, 4):
        used = []
        for count in (shards, 2 * shards):  # their difference leaves out what a run needs once
            server.counts.clear()
            extract(f"s3://features/{workers}-{count}.zarr", count, workers)
            used.append(Counter(server.counts))
        each = [(used[1][kind] - used[0][kind]) / shards for kind in ("write", "read", "delete")]
        print(f"| {workers} | {' | '.join(f'{value:.1f}' for value in each)} |", flush=True)


if __name__ == "__main__":
    main()
