"""Gains of layers and joined encoders: fits on one store, compared on the same held-out pairs.

    python benchmarks/layers.py features/layers.zarr --seeds 3 --image efficientnet-lite0+efficientnet-lite0@-2

Each named encoder is fitted with the default of the other side, and compared with the default pair by paired bootstrap
intervals over held-out training pairs, of the mean R@1 over captions, directions and seeds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sail_align.align.data.pairs import open_pairs, read_rows, split_held_out
from sail_align.align.fit import fit
from sail_align.align.hub.embeddings import embed
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import ranks

HELD_OUT = 0.2


def hits(
    store: Path, captions: list[str], image: str, text: str, seed: int, options: dict[str, Any]
) -> NDArray[np.float64]:
    """Fit heads, and return the mean hit of each held-out pair, (N,), over captions and directions."""
    pairs = open_pairs([store], captions, image_encoder=image, text_encoder=text)
    rows = split_held_out(pairs, [each.usable() for each in pairs], HELD_OUT)
    image_ND, text_CND = read_rows(pairs, rows)
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Any] = {"image_encoder": image, "text_encoder": text, "held_out": HELD_OUT, "quiet": True}
        kinds["captions"] = captions or None
        result = fit(store, out=Path(folder) / "run", **kinds, **options, **_seed(options, seed))
        model = load_run(result.run).model
        x_NE = embed(model.encode_image, image_ND, "cpu")
        found = []
        for text_ND in text_CND:
            image_ranks, text_ranks = ranks(x_NE, embed(model.encode_text, text_ND, "cpu"), np.arange(len(x_NE)))
            found.append(((image_ranks == 0).astype(float) + (text_ranks == 0)) / 2)
    return np.mean(found, axis=0)


def _seed(options: dict[str, Any], seed: int) -> dict[str, Any]:
    return {} if options["head"] == "cca" else {"seed": seed}


def main() -> None:
    """Print a Markdown row for each combination."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--base", nargs=2, default=["efficientnet-lite0", "minilm-l6"], metavar=("IMAGE", "TEXT"))
    parser.add_argument("--image", nargs="*", default=[])
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--pair", nargs="*", default=[], help="IMAGE,TEXT")
    parser.add_argument("--captions", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default={"head": "linear", "image_power": 0.5})
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    image, text = chosen.base
    names = [(image, text), *((each, text) for each in chosen.image), *((image, each) for each in chosen.text)]
    names += [tuple(each.split(",")) for each in chosen.pair]
    seeds = range(1 if chosen.options["head"] == "cca" else chosen.seeds)
    base: NDArray[np.float64] | None = None
    for image, text in names:
        by_seed = [100 * hits(chosen.store, chosen.captions, image, text, seed, chosen.options) for seed in seeds]
        mean_N = np.mean(by_seed, axis=0)
        base = mean_N if base is None else base
        low, high = mean_interval(mean_N - base)
        spread = np.std([each.mean() for each in by_seed])
        gain = f"{(mean_N - base).mean():+.1f} ({low:+.1f} – {high:+.1f})"
        print(f"| `{image}` | `{text}` | {mean_N.mean():.1f} ± {spread:.1f} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
