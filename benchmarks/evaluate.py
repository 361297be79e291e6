"""Measure the cost of scoring a second checkpoint, and of ranking sets of growing size.

Example:
    python benchmarks/evaluate.py --manifest coco-val2017 --image-encoder dinov2-large --text-encoder gte-large

`sail-eval` scores two runs of untrained heads on the same encoders, one after the other, with one folder of features.
The first run encodes the set, and the second finds its features. Then random float32 embeddings are ranked, against the
bare matrix product of the same sizes. The increase of the process's memory while it ranks is printed beside the size of
the full score matrix. `--only-ranks` skips the first table. Each candidate runs in its own process.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import FitSettings
from sail_align.align.stats.metrics import TILE, ranks
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.manifest import find_manifest

SAIL_EVAL = Path(sys.executable).parent / "sail-eval"
WIDTH = 1_024
SIZES = (
    (5_000, 25_000, WIDTH),
    (10_000, 10_000, WIDTH),
    (40_000, 40_000, WIDTH),
    (50_000, 50_000, 32),
    (100_000, 100_000, 32),
    (200_000, 200_000, 32),
)
"""Images, captions, dimensions."""
TIMES = re.compile(r": ([0-9.]+) s, of which ([0-9.]+) s for encoding")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--manifest", action="append", help="Evaluation set; may be repeated.  [default: two of the demo]"
    )
    parser.add_argument("--data-root", help="Folder of the sets' files.")
    parser.add_argument("--image-encoder", default="efficientnet-lite0")
    parser.add_argument("--text-encoder", default="minilm-l6")
    parser.add_argument("--only-ranks", action="store_true")
    parser.add_argument("--rank", type=int, nargs=3, metavar=("IMAGES", "CAPTIONS", "WIDTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        print(json.dumps(rank(*given.rank)))
        return
    if not given.only_ranks:
        with tempfile.TemporaryDirectory() as folder:
            manifests = given.manifest or ["demo-retrieval", "demo-objects"]
            checkpoints(Path(folder), manifests, given.data_root, given.image_encoder, given.text_encoder)
    print("| images × captions × width | both rankings | product alone | ratio | increase of memory | full matrix |")
    print("|---|---|---|---|---|---|")
    for images, captions, width in SIZES:
        ours, bare, increase = measured(images, captions, width)
        matrix = images * captions * 4 / 1e9
        numbers = f"{ours:.1f} s | {bare:.1f} s | {ours / bare:.2f} | {increase:.2f} GB | {matrix:.1f} GB |"
        print(f"| {images:,} × {captions:,} × {width:,} | {numbers}", flush=True)


def checkpoints(folder: Path, manifests: list[str], data_root: str | None, image: str, text: str) -> None:
    """Score two runs on the sets and print the times."""
    encoders = ImageEncoderConfig(image).load().identity, TextEncoderConfig(text).load().identity
    runs = [untrained_run(folder / f"run-{seed}", *encoders, seed=seed) for seed in (1, 2)]
    where = ["--data-root", data_root] if data_root else []
    print("| set | rows | first checkpoint | encoding | second checkpoint | ratio |\n|---|---|---|---|---|---|")
    for manifest in manifests:
        about, _ = find_manifest(manifest, data_root)
        times, walls = [], []
        for run in runs:
            command = [SAIL_EVAL, about.task.kind, manifest, "--run", run, "--features-dir", folder, *where]
            started = time.perf_counter()
            shown = subprocess.run(command, check=True, capture_output=True, text=True)
            walls.append(time.perf_counter() - started)
            times.append([float(found) for found in TIMES.search(shown.stderr).groups()])
            items = json.loads((run / "scores.json").read_bytes())["records"][-1]["items"]
        (first, encoding), (second, _) = times
        print(
            f"| {about.name} | {items:,} | {walls[0]:.1f} s ({first:.1f} s without start-up) | "
            f"{encoding:.1f} s | {walls[1]:.1f} s ({second:.1f} s) | "
            f"1 / {walls[0] / walls[1]:.1f} (1 / {first / second:.1f}) |"
        )


def untrained_run(folder: Path, image: Identity, text: Identity, seed: int) -> Path:
    """Save a run with initial heads."""
    torch.manual_seed(seed)
    shape = Architecture("glu", image.spec.dim, text.spec.dim, WIDTH)
    settings = {**asdict(FitSettings(head="glu", dim=WIDTH, steps=1)), "training_rows": 0, "held_out_rows": 0}
    settings |= {"captions": [], "stores": [], "store_digests": []}
    about = {"architecture": asdict(shape), "image": image.to_json(), "text": text.to_json(), "settings": settings}
    Checkpoint.write(RunFolder(folder).checkpoint(1), shape.build().state_dict(), about, step=1)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def measured(images: int, captions: int, width: int) -> tuple[float, float, float]:
    """Return the result of `rank` in its own process."""
    command = [sys.executable, __file__, "--rank", *map(str, (images, captions, width))]
    ours, bare, increase = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return ours, bare, increase


def rank(images: int, captions: int, width: int) -> tuple[float, float, float]:
    """Rank unit vectors in both directions, each caption near its image. Then only multiply the same tiles.

    Returns:
        Seconds of the ranking, seconds of the product, and the increase of the process's peak memory by ranking in GB.
    """
    generator = np.random.default_rng(0)
    owner = np.sort(generator.integers(0, images, captions))
    image_NE = generator.standard_normal((images, width), dtype=np.float32)
    text_ME = generator.standard_normal((captions, width), dtype=np.float32)
    for start in range(0, captions, TILE):  # in blocks, so that this peak does not hide that of ranking
        text_ME[start : start + TILE] += image_NE[owner[start : start + TILE]] / 3
    for each in (image_NE, text_ME):
        each /= np.sqrt(np.einsum("ne,ne->n", each, each))[:, None]
    ranks(image_NE[:8], text_ME[:1], np.zeros(1, dtype=np.int64))  # warm up
    before, started = _peak_memory(), time.perf_counter()
    ranks(image_NE, text_ME, owner)
    ours, increase = time.perf_counter() - started, _peak_memory() - before
    room_TT, started = torch.empty(TILE, TILE), time.perf_counter()
    for first in range(0, images, TILE):
        for second in range(0, captions, TILE):
            image_IE, text_TE = image_NE[first : first + TILE], text_ME[second : second + TILE]
            room = room_TT[: len(image_IE), : len(text_TE)]
            torch.mm(torch.from_numpy(image_IE), torch.from_numpy(text_TE).T, out=room)
    return ours, time.perf_counter() - started, increase


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
