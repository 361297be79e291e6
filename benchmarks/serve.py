"""Load on the search page: many clients that search and look at pictures, for a while.

Example:
    python benchmarks/serve.py runs/photos-linear features/photos.zarr --clients 50 --seconds 60

It starts `sail-align serve`. Each client sends one request after the other: a search with words of the captions, half
of them new to the server, then two of the pictures found. Printed are the time until the server answers, the requests,
the errors, and the times of searches and pictures.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import psutil

from sail_align import open_store

SAIL_ALIGN = Path(sys.executable).parent / "sail-align"
WORDS, KNOWN = 6, 50


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("store")
    parser.add_argument("--data-root")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    store = open_store(given.store)
    samples = store.samples(0, min(store.rows, 5_000))
    words = sorted(
        {word for sample in samples for text in sample.captions.values() for word in text.split() if word.isalpha()}
    )
    command = [SAIL_ALIGN, "serve", given.run, given.store, "--port", "0"]
    command += ["--data-root", given.data_root] if given.data_root else []
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(re.search(r":(\d+)/", server.stdout.readline() if server.stdout else "")[1])
            answers = time.perf_counter() - start
            while not json.loads(get(port, "/progress")[1])["ready"]:
                time.sleep(0.05)
            print(f"answers after {answers:.1f} s, ready after {time.perf_counter() - start:.1f} s", flush=True)
            report_load(port, words, given.clients, given.seconds)
            print(f"memory of the server {psutil.Process(server.pid).memory_info().rss / 1e6:.0f} MB")
        finally:
            server.terminate()


def report_load(port: int, words: list[str], clients: int, seconds: float) -> None:
    """Let clients send requests, and print their times."""
    times: dict[str, list[float]] = {"search": [], "picture": []}
    errors: list[str] = []
    known = [" ".join(random.Random(0).choices(words, k=WORDS)) for _ in range(KNOWN)]
    end = time.perf_counter() + seconds

    def timed(kind: str, path: str) -> bytes:
        start = time.perf_counter()
        try:
            status, content = get(port, path)
        except OSError as problem:
            status, content = 0, str(problem).encode()
        times[kind].append(time.perf_counter() - start)
        if status != 200:
            errors.append(f"{path}: {status} {content[:100]!r}")
        return content if status == 200 else b""

    def client(seed: int) -> None:
        chosen = random.Random(seed)
        while time.perf_counter() < end:
            query = chosen.choice(known) if chosen.random() < 0.5 else " ".join(chosen.choices(words, k=WORDS))
            found = timed("search", f"/?{urlencode({'q': query, 'format': 'json'})}")
            hits = json.loads(found)["runs"][0]["hits"] if found else []
            for hit in chosen.sample(hits, min(2, len(hits))):
                timed("picture", hit["thumbnail"])

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(map(len, times.values()))
    print(f"{clients} clients, {seconds:.0f} s: {total:,} requests ({total / seconds:.0f}/s), {len(errors)} errors")
    for kind, taken in times.items():
        middle, slow, slowest = 1e3 * np.quantile(taken, [0.5, 0.95, 1])
        print(f"  {kind}: {len(taken):,}, median {middle:.0f} ms, 95 % below {slow:.0f} ms, slowest {slowest:.0f} ms")
    for error in errors[:5]:
        print(f"  {error}")


def get(port: int, path: str) -> tuple[int, bytes]:
    """Return the status and the content of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


if __name__ == "__main__":
    main()
