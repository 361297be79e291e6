r"""Compare `sail-align fit` with the recipes of other methods, on the same features.

Each recipe of `peer_recipes.py` is tuned on held-out training images: its value and, for gradient recipes, its last
step (early stopping) have the highest mean R@1. It is then trained on all training images with several seeds, and
scored on an evaluation store or, without --test, on a fifth of the images that nothing else used. Ours is `sail-align
fit` with its defaults, not tuned here.

Each model is scored by the cosine and with a bank correction on top (inverted softmax of the similarities to training
items: Smith et al., 2017; QB-Norm, Bogolin et al., 2022), whose sharpness β is tuned too. Finished fits are reused;
rerun the command to resume. Writes peers.md and peers.json.

    python benchmarks/peers.py --train features/flickr8k-train.zarr --test features/flickr8k-test.zarr --out runs/peers
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peer_recipes import PEERS, POWERED, Data, Embedder, Recipe

import sail_align
from sail_align.align.data.pairs import open_pairs, read_rows
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.align.stats.metrics import ranks
from sail_align.align.stats.tables import format_table, mean_std

BETAS = (5.0, 10.0, 20.0, 40.0)
SPLIT_SEED, SCORE_SEED = 0, 1
HELD_OUT = 0.2
SCORINGS = 4
"""Number of times that a gradient recipe is scored while it is tuned."""

Hits = NDArray[np.float64]
"""Shares of right answers at rank 1 (N, 2) of each image: over its captions as queries, and as a query itself."""


@dataclass(frozen=True)
class Ours:
    """A fit of this project, named by its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seeded = True


OURS = (
    Ours("ours: the default"),
    Ours("ours: GLU heads", {"preset": "medium"}),
    Ours("ours: closed form", {"head": "cca"}),
    Ours("ours: probabilistic CCA", {"head": "pcca"}),
)


@dataclass(frozen=True)
class Bench:
    """Data and results of one comparison.

    `exclude` are files of keys that `sail-align fit` leaves out. No further fit begins after the deadline.
    """

    store: Path
    exclude: Sequence[Path]
    out: Path
    train: Data
    test: Data
    held: NDArray[np.bool_]
    deadline: float

    def tuned(self, recipe: Recipe) -> dict[str, Any] | None:
        """Return the best `value`, `steps` and `beta` of a recipe on held-out training images, or None if not yet."""
        path = self.out / f"{slug(recipe.name)}.tuned.json"
        if path.exists():
            return dict(json.loads(path.read_bytes()))
        data, held = self.train.powered(recipe.power), torch.from_numpy(self.held)
        inner, outer = data.rows(~held), data.rows(held)
        found: list[dict[str, Any]] = []
        for value in recipe.grid:
            part = path.with_suffix(f".{value:g}.json")
            if not part.exists():
                if time.monotonic() > self.deadline:
                    return None
                part.write_text(json.dumps(self._course(recipe, inner, outer, value)))
            found += json.loads(part.read_bytes())
        best = {**max(found, key=lambda each: each["r1"]), "tried": found}
        path.write_text(json.dumps(best))
        return best

    def _course(self, recipe: Recipe, inner: Data, outer: Data, value: float) -> list[dict[str, Any]]:
        """Train on `inner`; return scores on `outer` during training, or once for a closed form."""
        found: list[dict[str, Any]] = []
        bank = inner._replace(text=inner.text[:1])
        every = getattr(recipe.fit, "__self__", None) and max(1, recipe.fit.__self__.steps(inner) // SCORINGS)

        def watch(step: int, model: AlignmentModel | Embedder) -> bool:
            if not every or step % every == 0:
                with torch.no_grad():
                    hits = score(model, bank, outer, BETAS)
                r1 = {name: 100 * float(each.mean()) for name, each in hits.items()}
                beta = max(BETAS, key=lambda beta: r1[f"{beta:g}"])
                found.append({"value": value, "steps": step, "beta": beta, "r1": r1["cosine"], "bank": r1[f"{beta:g}"]})
            return False

        model = recipe.fit(inner, value, SPLIT_SEED, watch)
        if not every:
            watch(0, model)
        return found

    def hits(self, entry: Recipe | Ours, seed: int) -> dict[str, Hits] | None:
        """Return hits on the evaluation store by way of scoring, or None if they are not computed yet."""
        path = self.out / f"{slug(entry.name)}.{seed}.npz"
        if not path.exists():
            if isinstance(entry, Recipe):
                chosen = self.tuned(entry)
                if chosen is None or time.monotonic() > self.deadline:
                    return None
                data, test = self.train.powered(entry.power), self.test.powered(entry.power)
                model = entry.fit(data, chosen["value"], seed, lambda step, _: step == chosen["steps"])
                found = score(model, data, test, [chosen["beta"]])
                np.savez(path, cosine=found["cosine"], bank=found[f"{chosen['beta']:g}"])
            elif time.monotonic() > self.deadline:
                return None
            else:
                run = self.out / f"{slug(entry.name)}.{seed}"
                sail_align.fit(self.store, exclude=self.exclude, out=run, quiet=True, seed=seed, **entry.options)
                np.savez(path, **score_run(run, self.train, self.test))
        with np.load(path) as saved:
            return dict(saved)


@torch.no_grad()
def score_run(run: Path, train: Data, test: Data) -> dict[str, Hits]:
    """Score a run of ours by the cosine and, if it has one, its own correction; otherwise a bank with CCA's β of 10."""
    model = load_run(run).model
    if getattr(model, "correction", None) is None:
        found = score(model, train, test, [10.0])
        return {"cosine": found["cosine"], "bank": found["10"]}
    own = count_hits(model.corrected_image(test.image), model.corrected_text(test.text))
    return {"cosine": count_hits(model.encode_image(test.image), model.encode_text(test.text)), "bank": own}


@torch.no_grad()
def score(model: AlignmentModel | Embedder, train: Data, test: Data, betas: Iterable[float]) -> dict[str, Hits]:
    """Return the hits on `test` by the `cosine` and, by the name of each β, with a bank of all training items."""
    image_NE, text_CNE = model.encode_image(test.image), model.encode_text(test.text)
    bank_image, bank_text = model.encode_image(train.image), model.encode_text(train.text).flatten(0, 1)
    found = {"cosine": count_hits(image_NE, text_CNE)}
    with_texts, with_images = image_NE @ bank_text.T, text_CNE @ bank_image.T
    for beta in betas:
        image_hubness_N, text_hubness_CN = (hubness(each, beta) for each in (with_texts, with_images))
        image = torch.cat((image_NE, -image_hubness_N[:, None], torch.ones_like(image_hubness_N)[:, None]), -1)
        text = torch.cat((text_CNE, torch.ones_like(text_hubness_CN)[..., None], -text_hubness_CN[..., None]), -1)
        found[f"{beta:g}"] = count_hits(image, text)
    return found


def hubness(similarities: torch.Tensor, beta: float) -> torch.Tensor:
    """Return 1/β log mean exp(β s) of similarities (…, M) with a bank."""
    return ((beta * similarities).logsumexp(-1) - math.log(similarities.shape[-1])) / beta


def count_hits(image_NE: torch.Tensor, text_CNE: torch.Tensor) -> Hits:
    """Return the hits of retrieval both ways, by image."""
    captions, images, _ = text_CNE.shape
    owner_M = np.tile(np.arange(images), captions)
    image_ranks_N, text_ranks_M = ranks(image_NE.numpy(), text_CNE.flatten(0, 1).contiguous().numpy(), owner_M)
    return np.stack(((text_ranks_M == 0).reshape(captions, images).mean(0), image_ranks_N == 0), 1).astype(np.float64)


def read_data(path: Path, **encoders: str) -> Data:
    """Read the rows of a store that have an image and all captions, of the encoders named to `open_pairs`."""
    pairs = open_pairs([path], **encoders)
    image_ND, text_CND = read_rows(pairs, [each.usable() for each in pairs])
    return Data(torch.from_numpy(image_ND).float(), torch.from_numpy(text_CND).float())


def read_keys(path: Path, **encoders: str) -> NDArray[np.str_]:
    """Return the keys of the rows that `read_data` reads."""
    (pairs,) = open_pairs([path], **encoders)
    keys = np.array(pairs.store.index(["key"])["key"].to_pylist())
    return np.asarray(keys[pairs.usable()])


def split(rows: int, seed: int) -> NDArray[np.bool_]:
    """Return a random mask of the fraction `HELD_OUT` of the rows."""
    return np.asarray(np.random.default_rng(seed).permutation(rows) < HELD_OUT * rows)


def slug(name: str) -> str:
    """Return a name of a file."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name).split())


def ratio(ours_N: Hits, theirs_N: Hits) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two means over the same images, and its 95 % interval (paired bootstrap over images)."""

    def of(drawn_N: NDArray[np.float64]) -> float:
        return weighted_mean(ours_N, drawn_N) / weighted_mean(theirs_N, drawn_N)

    return of(np.ones(len(ours_N))), interval(bootstrap([of], len(ours_N))[:, 0])


def report(bench: Bench, entries: Sequence[Recipe | Ours], seeds: int) -> tuple[str, dict[str, Any]]:
    """Compute what is missing until the deadline; return the table and all numbers."""
    results: dict[str, dict[str, list[Hits]]] = {}
    for entry in entries:
        found = [bench.hits(entry, seed) for seed in range(seeds if entry.seeded else 1)]
        if done := [each for each in found if each is not None]:
            results[entry.name] = {way: [each[way] for each in done] for way in ("cosine", "bank")}
            scores = ", ".join(f"{way} {mean_std(percents(hits))}" for way, hits in results[entry.name].items())
            print(f"{entry.name}: {scores} ({len(done)} of {len(found)} fits)", flush=True)
    means = {
        name: {way: np.mean([each.mean(1) for each in hits], axis=0) for way, hits in ways.items()}
        for name, ways in results.items()
    }
    leader = max(
        (each.name for each in OURS if each.name in means), key=lambda name: means[name]["bank"].mean(), default=None
    )
    rows, record = [], {}
    for name, ways in sorted(results.items(), key=lambda each: -means[each[0]]["bank"].mean()):
        cells = [
            mean_std(percents(ways["cosine"], 0)),
            mean_std(percents(ways["cosine"], 1)),
            *(mean_std(percents(hits)) for hits in ways.values()),
        ]
        record[name] = {way: [percents(hits, 0), percents(hits, 1)] for way, hits in ways.items()}
        for way in ways:
            best, (low, high) = (
                ratio(means[leader]["bank"], means[name][way]) if leader else (math.nan, (math.nan,) * 2)
            )
            cells.append("" if name == leader and way == "bank" else f"{best:.2f} ({low:.2f} – {high:.2f})")
        rows.append((name, *cells))
    header = ("recipe", "T2I R@1", "I2T R@1", "mean R@1", "with a bank", "ours / cosine", "ours / with a bank")
    return format_table(header, rows) + f"\n\nOurs: {leader}, corrected.\n", record


def percents(hits: Sequence[Hits], way: int | None = None) -> list[float]:
    """Return R@1 of each seed in percent: of one way, or the mean of both."""
    return [100 * float((each if way is None else each[:, way]).mean()) for each in hits]


def main() -> None:
    """Tune, train, score and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--train", type=Path, required=True, help="store to train on")
    options.add_argument("--test", type=Path, help="store with the same captions to score on")
    options.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder for fits and results")
    options.add_argument("--only", nargs="*", help="parts of the names of recipes")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no further fit after this time")
    options.add_argument("--quick", action="store_true", help="one seed, without heads of over ten million weights")
    asked = options.parse_args()
    entries = [
        each for each in (*OURS, *PEERS, *POWERED) if not asked.only or any(part in each.name for part in asked.only)
    ]
    if asked.quick:
        entries = [each for each in entries if "SAIL" not in each.name and "all features" not in each.name]
    asked.out.mkdir(parents=True, exist_ok=True)
    train = read_data(asked.train)
    excluded: list[Path] = []
    if asked.test:
        test = read_data(asked.test)
    else:
        held = split(len(train.image), SCORE_SEED)
        excluded = [asked.out / "scored.txt"]
        excluded[0].write_text("\n".join(read_keys(asked.train)[held]) + "\n")
        train, test = train.rows(torch.from_numpy(~held)), train.rows(torch.from_numpy(held))
    deadline = time.monotonic() + 60 * asked.minutes
    bench = Bench(asked.train, excluded, asked.out, train, test, split(len(train.image), SPLIT_SEED), deadline)
    table, record = report(bench, entries, 1 if asked.quick else asked.seeds)
    (asked.out / "peers.md").write_text(table)
    (asked.out / "peers.json").write_text(json.dumps(record, indent=1))
    print(table)


if __name__ == "__main__":
    main()
