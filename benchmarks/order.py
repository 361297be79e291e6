"""Is training in the stream's order as good as in a full permutation? On real features, several seeds per cell.

The rows of a store are rewritten in small chunks, once in their order and once in the worst order for a stream: similar
images are neighbours, so that each chunk has images of one kind. Heads are then trained with buffers of several sizes.
The largest holds the whole store, which is a full permutation; the smallest is a batch of whole chunks. The medium one
has as many batches as a fit with the paper's batch size, and with chunks of two rows as many chunks, 128. Everything
else is equal, including the initial weights of a seed. Pairs of another store are scored.

    python benchmarks/order.py --features features/flickr8k-train.zarr --score features/flickr8k-test.zarr
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from numpy.typing import NDArray

from sail_align.align.data.loader import Batch, Stream
from sail_align.align.data.pairs import Half, Pairs, open_pairs, read_rows
from sail_align.align.stats.tables import format_table, mean_std
from sail_align.align.train.initial import build_model, start_model
from sail_align.align.train.plan import Plan, make_plan
from sail_align.align.train.step import Stepper, make_optimizer
from sail_align.align.train.trainer import score
from sail_align.extract.data import Part, Sample
from sail_align.extract.store.store import Store

CPU = torch.device("cpu")
BATCH_ROWS = 64
BUFFERS = {"a batch": BATCH_ROWS, "4 batches": 4 * BATCH_ROWS, "all rows (full permutation)": 1 << 30}


def main() -> None:
    """Train each cell, printing a line for each, then the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--features", type=Path, required=True, help="store to train on")
    options.add_argument("--score", type=Path, required=True, help="store with the same captions to retrieve from")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--chunk-rows", type=int, default=2)
    options.add_argument("--head", default="linear")
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--lr", type=float, default=5e-4)
    asked = options.parse_args()
    tested = open_pairs([asked.score])
    test = Batch(*map(torch.from_numpy, read_rows(tested, [each.usable() for each in tested])))
    (pairs,) = open_pairs([asked.features])
    images, texts = read_rows([pairs], [pairs.usable()])
    size = asked.chunk_rows
    orders = {"as it comes": np.arange(len(images)), "alike side by side": alike(images.astype(np.float32), size)}
    recipe = {"preset": "paper", "head": asked.head, "dim": 256, "held_out": 0.0, "lr": asked.lr}
    recipe |= {"batch_size": BATCH_ROWS, "epochs": asked.epochs} | ({} if asked.head == "linear" else {"expansion": 1})
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for order, rows in orders.items():
            store = write(Path(folder) / f"{order}.zarr", pairs, images[rows], texts[:, rows], size)
            plans = [make_plan([store], {**recipe, "seed": seed})[0] for seed in range(asked.seeds)]
            found = {name: [trained(plan, buffer, test) for plan in plans] for name, buffer in BUFFERS.items()}
            full = found[list(BUFFERS)[-1]]
            for name, scores in found.items():
                differences = [one["r1"] - other["r1"] for one, other in zip(scores, full, strict=True)]
                cells = [mean_std([each[way] for each in scores]) for way in ("t2i_r1", "i2t_r1", "r1")]
                difference = "" if scores is full else f"{mean(differences):+.1f} ± {stdev(differences):.1f}"
                lines.append((order, name, *cells, difference))
                print(*lines[-1], flush=True)
    header = ("rows on disk", "buffer", "T2I R@1", "I2T R@1", "mean R@1", "less the full permutation's")
    chance = 100 / len(test.images)
    print(f"\n{format_table(header, lines, 'll')}\n\n{len(images):,} pairs, {size} a chunk, chance {chance:.1f}.")


def trained(plan: Plan, buffer_rows: int, test: Batch) -> dict[str, float]:
    """Train a plan's model with buffers of a size, and score it."""
    settings = plan.settings
    rows = {"batch_size": settings.batch_size, "seed": settings.seed, "buffer_rows": buffer_rows}
    with Stream(plan.pairs, plan.training, policy=plan.policy, **rows) as stream:
        model = build_model(plan, CPU)
        start_model(model, plan, stream, CPU, quiet=True)
        stepper = Stepper(model, plan.loss(), make_optimizer(model, settings), CPU)
        for step, (batch, _) in zip(range(settings.steps), stream.batches(), strict=False):
            stepper.step(batch, settings.learning_rate(step))
    return score(model, plan.loss(), test, CPU)


def alike(features_ND: NDArray[np.float32], chunk_rows: int) -> NDArray[np.int64]:
    """Return the rows ordered by similarity: recursively halved along the leading principal component."""

    def sorted_(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if len(rows) <= chunk_rows:
            return [rows]
        centred = unit_ND[rows] - unit_ND[rows].mean(axis=0)
        _, vectors = np.linalg.eigh(centred @ centred.T)
        rows = rows[np.argsort(vectors[:, -1])]
        middle = -(-len(rows) // (2 * chunk_rows)) * chunk_rows  # a whole number of chunks
        return [*sorted_(rows[:middle]), *sorted_(rows[middle:])]

    unit_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    return np.concatenate(sorted_(np.arange(len(features_ND))))


def write(path: Path, like: Pairs, images: Half, texts: Sequence[Half], chunk_rows: int) -> Path:
    """Write a store of these rows in small chunks."""
    samples = [Sample(f"{row:06d}", f"{row}.jpg", dict.fromkeys(like.captions, "…")) for row in range(len(images))]
    store = Store.create(
        path,
        dataset=path.stem,
        manifest={},
        parts=[Part.of(samples)],
        captions=like.captions,
        shard_rows=64 * chunk_rows,
        chunk_rows=chunk_rows,
        quiet=True,
    )
    arrays = [store.add(like.image.identity)]
    arrays += [store.add(text.identity, name) for name, text in zip(like.captions, like.texts, strict=True)]
    for array, features in zip(arrays, (images, *texts), strict=True):
        for shard in array.shards:
            span = slice(*array.span(shard))
            array.write(shard, features[span], np.zeros(len(features[span]), np.uint8))
    return path


if __name__ == "__main__":
    main()
