r"""Score averages over views of held-out training images (`sail-eval --views`), and compare them with plain ones.

Each seed holds out a fifth of the images, fits on the others, and embeds the held-out images through every view. The
score is the mean of both R@1 among the held-out images. Intervals are paired, over images and seeds.

    python benchmarks/views.py features/flickr-train.zarr flickr-train.yaml --fit head=cca \
        --fit head=linear,image_power=0.5
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from peers import count_hits, read_data, read_keys, split
from torch.nn.functional import normalize

import sail_align
from sail_align.align.data.pairs import open_pairs
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.align.stats.tables import format_table
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.views import OWN, VIEWS, View
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.manifest import find_manifest

ALL = tuple(dict.fromkeys(view for views in VIEWS.values() for view in views))


def encode_views(store: Path, manifest: Path, data_root: str | None, rows: np.ndarray) -> dict[View, torch.Tensor]:
    """Return the features of every view of usable rows of a store, (rows, D) each. Pictures are decoded once."""
    (pairs,) = open_pairs([store])
    about, root = find_manifest(str(manifest), data_root)
    source = about.open_source(root)
    encoder = cast(VisionEncoder, load_recorded(pairs.image.identity))
    chosen = np.flatnonzero(pairs.usable())[rows].tolist()
    samples = [pairs.store.samples(row, row + 1, captions=[])[0] for row in chosen]

    def pixels(image: str) -> list[torch.Tensor]:
        picture = source.image(image)
        found = []
        for view in ALL:
            with encoder.through(view):
                found.append(encoder.preprocess(picture))
        return found

    features: list[torch.Tensor] = []
    for start in range(0, len(samples), 4):
        seen = [pixels(sample.image) for sample in samples[start : start + 4]]
        features.append(encoder.encode(torch.stack([each for views in seen for each in views])))
    by_view = torch.cat(features).half().float().reshape(len(samples), len(ALL), -1)
    return {view: by_view[:, place] for place, view in enumerate(ALL)}


def main() -> None:
    """Fit, score and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--fit", action="append", required=True, metavar="KEY=VALUE,…")
    parser.add_argument("--data-root")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    data, keys = read_data(asked.store), read_keys(asked.store)
    masks = [split(len(keys), seed) for seed in range(asked.seeds)]
    needed = np.flatnonzero(np.any(masks, axis=0))
    place = np.full(len(keys), -1)
    place[needed] = np.arange(len(needed))
    features = encode_views(asked.store, asked.manifest, asked.data_root, needed)
    own_ND = data.image[needed]
    print(
        f"{len(needed)} images; own view as stored: {bool(torch.allclose(features[OWN], own_ND, atol=2e-2))}",
        flush=True,
    )
    rows = []
    for options in asked.fit:
        parsed: Mapping[str, Any] = {
            name: json.loads(value) if value[0].isdigit() else value
            for name, value in (each.split("=") for each in options.split(","))
        }
        hits: dict[str, list[np.ndarray]] = {name: [] for name in ("plain", *VIEWS)}
        for seed, mask in enumerate(masks):
            with TemporaryDirectory() as folder:
                held_out = Path(folder) / "keys.txt"
                held_out.write_text("\n".join(keys[mask]))
                out = Path(folder) / "run"
                sail_align.fit(asked.store, out=out, exclude=held_out, held_out=0.0, seed=seed, quiet=True, **parsed)
                model = load_run(out).model
            with torch.no_grad():
                text_CNE = model.encode_text(data.text[:, mask])
                embedded = {view: model.encode_image(each[place[mask]]) for view, each in features.items()}
                hits["plain"].append(count_hits(embedded[OWN], text_CNE))
                for name, views in VIEWS.items():
                    mean_NE = normalize(torch.stack([embedded[view] for view in views]).mean(0), dim=-1)
                    hits[name].append(count_hits(mean_NE, text_CNE))
        plain_N = np.concatenate(hits["plain"]).mean(1)
        for name, found in hits.items():
            gain_N = np.concatenate(found).mean(1) - plain_N
            draws = bootstrap([lambda drawn_N, gain_N=gain_N: weighted_mean(gain_N, drawn_N)], len(gain_N))
            low, high = (100 * each for each in interval(draws[:, 0]))
            r1 = [100 * each.mean() for each in found]
            gain = "" if name == "plain" else f"{100 * gain_N.mean():+.2f} ({low:+.2f} – {high:+.2f})"
            views = len(VIEWS.get(name, (OWN,)))
            rows.append((options, name, str(views), f"{np.mean(r1):.2f} ± {np.std(r1, ddof=1):.2f}", gain))
            print(*rows[-1], flush=True)
    print(format_table(("fit", "views", "encoded", "mean R@1", "gain"), rows))


if __name__ == "__main__":
    main()
