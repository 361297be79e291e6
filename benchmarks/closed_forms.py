"""Compare closed forms, ridges and banks on held-out pairs of a store, over several splits.

Example: python benchmarks/closed_forms.py --features features/flickr-train.zarr --rows 500 --rows 1600 --splits 2

Prints the mean R@1 of both directions among 400 held-out images, and its difference from the first row with a 95 %
bootstrap interval over the held-out images of all splits.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.model.closed_form import normed
from sail_align.align.model.correction import Bank, Correction, Cosine, Gaussian
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import ranks
from sail_align.align.train.ridge import FoldedMoments

DIM, HELD_OUT, BLOCK = 256, 400, 8_192
FIXED = 2.0


def read(path: Path, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images (N, D) and texts (C, N, D) of the complete rows of a store, after power and LayerNorm."""
    pairs = open_pairs([path])
    rows = [each.usable() for each in pairs]
    with Stream(pairs, rows, batch_size=1, seed=0) as stream:
        blocks = [(block.images.float(), block.texts.float()) for block in stream.scan()]
    images, texts = torch.cat([images for images, _ in blocks]), torch.cat([texts for _, texts in blocks], dim=1)
    return normed(images.sign() * images.abs() ** power), normed(texts)


def hits(correction: Correction, raw_NE: torch.Tensor, raw_CNE: torch.Tensor) -> np.ndarray:
    """Return the mean of both directions' R@1 for each image, (N,)."""
    owner_M = np.tile(np.arange(len(raw_NE)), len(raw_CNE))
    image = correction.extend(raw_NE, "image").double().numpy()
    text = correction.extend(raw_CNE.flatten(0, 1), "text").double().numpy()
    image_ranks, text_ranks = ranks(image, text, owner_M)
    by_text = (text_ranks == 0).reshape(len(raw_CNE), -1).mean(axis=0)
    return 50 * ((image_ranks == 0) + by_text)


def compare(images: torch.Tensor, texts: torch.Tensor, rows: int, split: int) -> dict[str, np.ndarray]:
    """Return the R@1 of each image of a split by each method."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(100 + split))
    held, kept = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + rows]
    folded = FoldedMoments(images.shape[1], texts.shape[2], len(kept))
    for block in kept.split(BLOCK):
        folded.add(images[block], texts[:, block])
    found = {}
    for likelihood, name, beta in ((False, "cosine", 20.0), (True, "likelihood ratio", 1.0)):
        auto = folded.choose_ridge(DIM, likelihood=likelihood)
        for ridge, label in ((FIXED, f"ridge {FIXED:g}"), (auto, "auto")):
            image_map, text_map, correlations = folded.total().cca(DIM, ridge, unit_norm=not likelihood)
            base: Correction = Cosine()
            if likelihood:
                base = Gaussian(DIM)
                base.fill(correlations)
            x, y = image_map(images[held]), text_map(texts[:, held])
            found[f"{name}, {label}"] = hits(base, x, y)
        bank = Bank(len(kept), DIM, base)
        bank.fill(image_map(images[kept]), text_map(texts[0, kept]), beta)
        found[f"{name}, auto, with a bank"] = hits(bank, x, y)
        print(f"  {rows} pairs, split {split}: {name} chose ridge {auto:g}", flush=True)
    return found


def main(
    features: Annotated[Path, typer.Option()],
    rows: Annotated[list[int], typer.Option()],
    splits: int = 2,
    power: float = 0.5,
) -> None:
    """Print one table per number of pairs."""
    images, texts = read(features, power)
    for count in rows:
        runs = [compare(images, texts, count, split) for split in range(splits)]
        first = next(iter(runs[0]))
        for name in runs[0]:
            values, base = (np.concatenate([run[each] for run in runs]) for each in (name, first))
            low, high = mean_interval(values - base)
            change = f"{(values - base).mean():+.1f} ({low:+.1f} to {high:+.1f})"
            print(f"{count:6} {name:36} {values.mean():5.1f}  {'' if name == first else change}", flush=True)


if __name__ == "__main__":
    typer.run(main)
