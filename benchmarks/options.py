r"""Compare options of `sail-align fit` on one store, by fits on parts of its rows that are scored on other rows.

Each recipe is a list of options, such as `preset=medium,image_power=1`; `default` has none. For each number of pairs
and each split, a recipe is fitted with the split's number as its seed, and scored on a fifth of the rows, which no fit
sees. Prints R@1, the mean of both directions in percent, by cosines and with the run's own hub correction, and the
paired differences to the first recipe with their 95 % intervals over images. Finished fits are reused.

    python benchmarks/options.py features/flickr8k-train.zarr --rows 500,1000,1600 default text_hidden=0 preset=medium
    python benchmarks/options.py features/layers.zarr default image_encoder=efficientnet-lite0+efficientnet-lite0@-2 \
        --base image_encoder=efficientnet-lite0,text_encoder=minilm-l6
"""

import argparse
import hashlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_recipes import Data
from peers import percents, read_data, read_keys, score_run, slug, split

import sail_align
from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.align.stats.tables import format_interval, format_table, mean_std, number


def parse(recipe: str) -> dict[str, Any]:
    """Return the options of a recipe, as keywords of `sail_align.fit`."""
    return {} if recipe == "default" else dict(each.split("=", 1) for each in recipe.split(","))


def main() -> None:
    """Fit what is missing, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--base", default="default", help="options of all recipes, unless one has its own")
    parser.add_argument("--rows", default="all", help="numbers of pairs to train on, with commas between them")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/options"), help="folder for fits and results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)

    def options_of(recipe: str) -> dict[str, Any]:
        return parse(asked.base) | parse(recipe)

    def encoders_of(recipe: str) -> dict[str, str]:
        return {name: each for name, each in options_of(recipe).items() if name.endswith("_encoder")}

    @cache
    def read(**encoders: str) -> Data:
        return read_data(asked.store, **encoders)

    keys = read_keys(asked.store, **encoders_of("default"))
    held = [split(len(keys), number) for number in range(asked.splits)]
    images = np.concatenate([np.flatnonzero(each) for each in held])

    def hits(recipe: str, rows: int, number: int) -> Mapping[str, Any]:
        which = hashlib.sha256(str(options_of(recipe)).encode()).hexdigest()[:8]  # a slug has no signs
        name = f"{asked.store.stem}-{slug(recipe)}-{which}.{rows}.{number}"
        path = asked.out / f"{name}.npz"
        if not path.exists():
            others = np.random.default_rng(number).permutation(np.flatnonzero(~held[number]))
            unseen = asked.out / f"{name}.txt"
            unseen.write_text("".join(f"{key}\n" for key in (*keys[held[number]], *keys[others[rows:]])))
            sail_align.fit(
                asked.store, exclude=unseen, out=asked.out / name, quiet=True, seed=number, **options_of(recipe)
            )
            data = read(**encoders_of(recipe))
            inner, outer = (data.rows(torch.from_numpy(each)) for each in (np.sort(others[:rows]), held[number]))
            np.savez(path, **score_run(asked.out / name, inner, outer))
        with np.load(path) as saved:
            return dict(saved)

    table = []
    most = min(int((~each).sum()) for each in held)
    for rows in [most] if asked.rows == "all" else [min(int(each), most) for each in asked.rows.split(",")]:
        first: dict[str, np.ndarray] = {}
        for recipe in asked.recipes:
            found = [hits(recipe, rows, number) for number in range(asked.splits)]
            cells = [f"{rows:,}", recipe]
            for way in ("cosine", "bank"):
                own_M = 100 * np.concatenate([each[way].mean(1) for each in found])
                gain_M = own_M - first.setdefault(way, own_M)
                low_high = interval(bootstrap([partial(weighted_mean, gain_M)], len(gain_M), groups_N=images)[:, 0])
                gain = f"{number(gain_M.mean(), sign='+')} ({format_interval(low_high, sign='+')})"
                cells += [mean_std(percents([each[way] for each in found])), gain if gain_M.any() else ""]
            table.append(cells)
            print(*cells, sep=" | ", flush=True)
    header = ("pairs", "options", "mean R@1", "difference", "corrected", "difference")
    (asked.out / "options.md").write_text(format_table(header, table) + "\n")
    print(format_table(header, table))


if __name__ == "__main__":
    main()
