r"""Compare settings of `sail-align fit` on parts of a store, held in memory: which preset suits how many pairs.

Each recipe is the small preset with changes, such as `head=linear,image_power=0.5`. For each number of pairs and each
split, it is trained as `fit` trains it, its best step is chosen on held-out pairs as `fit` chooses it, and it is scored
on a fifth of the rows, which no recipe sees. Prints R@1, the mean of both directions in percent, over the splits, and
the difference to the first recipe with its 95 % interval over rows. `corrected` is the same with hubs corrected by a
bank of training embeddings. Trials are kept in --out and reused.

    python benchmarks/presets.py --features features/flickr8k-train.zarr --rows 500,1000 head=glu head=linear
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.align.data.loader import Batch
from sail_align.align.data.pairs import open_pairs, read_rows
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.closed_form import Moments
from sail_align.align.model.loss import sigmoid_loss
from sail_align.align.settings import FitSettings, check_options, choose_settings
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import ranks
from sail_align.align.train.plan import architecture_of
from sail_align.align.train.ridge import FoldedMoments
from sail_align.align.train.step import Stepper, make_optimizer, seed_torch
from sail_align.align.train.trainer import SCORINGS

BETAS = (5.0, 10.0, 20.0, 40.0)
CPU = torch.device("cpu")
EXTRA = ("ema", "text_power")
"""Further values of a recipe besides settings: decay of an average of the weights, and the power of text features."""


class Rows:
    """Features of some rows in memory: images (N, D) and texts (C, N, D), float32."""

    def __init__(self, images: Tensor, texts: Tensor):
        self.images, self.texts = images, texts
        self._folded: dict[tuple[float, ...], FoldedMoments] = {}
        self._ridges: dict[tuple[float, ...], float] = {}

    def take(self, rows: NDArray[np.integer]) -> "Rows":
        """Return some of the rows."""
        index = torch.from_numpy(rows)
        return Rows(self.images[index], self.texts[:, index])

    def closed_form(self, model: AlignmentModel, settings: FitSettings) -> tuple[Moments, float]:
        """Return the moments of the inputs of a model, and the ridge of the settings; both are computed once."""
        form = (model.image_head.power, model.text_head.power, model.text_head.basis_dim, settings.seed)
        if form not in self._folded:
            dims = model.image_head.basis_dim, model.text_head.basis_dim
            self._folded[form] = FoldedMoments(*dims, len(self.images))
            self._folded[form].add(model.image_head.basis(self.images), model.text_head.basis(self.texts))
        folded, key = self._folded[form], (*form, settings.dim)
        if settings.ridge == "auto" and key not in self._ridges:
            self._ridges[key] = folded.choose_ridge(settings.dim)
        return folded.total(), self._ridges[key] if settings.ridge == "auto" else settings.ridge

    def batches(self, size: int, seed: int, positives: int | None) -> Iterator[Batch]:
        """Yield batches without end: each epoch has every row once, but for the last incomplete batch."""
        random = np.random.default_rng(seed)
        while True:
            order = random.permutation(len(self.images))
            for start in range(0, len(order) - size + 1, size):
                rows = torch.from_numpy(order[start : start + size])
                texts = self.texts[:, rows]
                if positives is not None:
                    drawn = random.random(texts.shape[:2]).argsort(axis=0)[:positives]
                    texts = torch.take_along_dim(texts, torch.from_numpy(drawn)[..., None], dim=0)
                yield Batch(self.images[rows], texts)


def train(
    rows: Rows, chosen_on: Rows, scored_on: Rows, settings: FitSettings, extra: Mapping[str, float]
) -> tuple[AlignmentModel, list[dict[str, float]]]:
    """Train on rows; return the model with the best `mrr` on others.

    Also return for each scoring its step, the scores on these others, and `test`, the mean R@1 on the rows to score on.
    """
    torch.manual_seed(settings.seed)
    architecture = architecture_of(settings, rows.images.shape[1], rows.texts.shape[2])
    model = architecture.build(scale=float(settings.temperature), bias=float(settings.bias))
    model.text_head.power = extra.get("text_power", 1.0)
    if settings.closed_form:
        moments, ridge = rows.closed_form(model, settings)
        image_map, text_map, _ = moments.cca(settings.dim, ridge)
        image_map.copy_to(model.image_head)
        text_map.copy_to(model.text_head)
    decay = extra.get("ema", 0.0)
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    stepper = Stepper(model, sigmoid_loss, make_optimizer(model, settings), CPU, in_parts=True)
    interval = -(-settings.steps // SCORINGS)
    curve: list[dict[str, float]] = []
    best_state: dict[str, Tensor] = {}

    def see(step: int, state: dict[str, Tensor]) -> None:
        now = scores(model, chosen_on)
        if not curve or now["mrr"] > max(each["mrr"] for each in curve):
            best_state.update({name: value.clone() for name, value in state.items()})
        curve.append({"step": step, **now, "test": scores(model, scored_on)["r1"]})

    see(0, averaged)
    batches = rows.batches(settings.batch_size, settings.seed, settings.positives)
    for step, batch in zip(range(1, settings.steps + 1), batches, strict=False):
        seed_torch(settings.seed, step - 1)
        stepper.step(batch, settings.learning_rate(step - 1))
        now = model.state_dict()
        averaged = {name: (decay * averaged[name] + (1 - decay) * now[name]) for name in now}
        if step % interval == 0 or step == settings.steps:
            kept = {name: value.clone() for name, value in now.items()}
            model.load_state_dict(averaged)
            see(step, averaged)
            model.load_state_dict(kept)
    model.load_state_dict(best_state)
    return model.eval(), curve


@torch.no_grad()
def scores(model: AlignmentModel, rows: Rows) -> dict[str, float]:
    """Return `r1`, `mrr` and `loss` as `fit` scores them, from one matrix of all similarities."""
    images, texts = model.eval()(rows.images, rows.texts)
    similarity_CNN = texts @ images.T
    own_CN = similarity_CNN.diagonal(dim1=1, dim2=2)
    text_ranks = (similarity_CNN > own_CN[..., None]).sum(2)
    wrong_CNN = similarity_CNN.masked_fill(torch.eye(len(images), dtype=torch.bool), -torch.inf)
    image_ranks = (wrong_CNN > own_CN.amax(0)).sum((0, 1))
    found = (text_ranks, image_ranks)
    r1, mrr = (
        50 * sum(float(value(ranks).double().mean()) for ranks in found)
        for value in (lambda ranks: ranks == 0, lambda ranks: 1 / (1 + ranks))
    )
    loss = sigmoid_loss(images, texts, model.log_scale, model.bias).total.item()
    return {"r1": r1, "mrr": mrr, "loss": loss}


@torch.no_grad()
def recalled(model: AlignmentModel, rows: Rows, bank: Rows | None = None, beta: float = 1.0) -> NDArray[np.float64]:
    """Return for each row the mean over both directions of whether it was found first, with a bank's correction."""
    images, texts = model(rows.images, rows.texts)
    texts = texts.flatten(0, 1)
    if bank is not None:
        other_images, other_texts = model(bank.images, bank.texts[0])
        image_hub = (beta * images @ other_texts.T).logsumexp(1, keepdim=True) / beta
        text_hub = (beta * texts @ other_images.T).logsumexp(1, keepdim=True) / beta
        images = torch.cat((images, -image_hub, torch.ones_like(image_hub)), 1)
        texts = torch.cat((texts, torch.ones_like(text_hub), -text_hub), 1)
    owner = np.tile(np.arange(len(images)), len(rows.texts))
    image_ranks, text_ranks = ranks(images.numpy(), texts.numpy(), owner)
    return ((image_ranks == 0) + (text_ranks == 0).reshape(len(rows.texts), -1).mean(0)) / 2


@lru_cache(maxsize=4)
def parts(store: Rows, pairs: int, split: int) -> tuple[Rows, Rows, Rows]:
    """Return `pairs` rows in two parts, to train on and to choose on, and the fifth of the rows `split` to score on."""
    fifths = np.array_split(np.random.default_rng(0).permutation(len(store.images)), 5)
    scored_on = fifths.pop(split)
    chosen_on, training = np.split(np.concatenate(fifths)[:pairs], [100])
    return store.take(training), store.take(chosen_on), store.take(scored_on)


def trial(store: Rows, pairs: int, split: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Train a recipe on `pairs` rows, 100 of them to choose the step, and score it on the fifth of the rows `split`."""
    rows, chosen_on, test = parts(store, pairs, split)
    extra = {name: float(recipe[name]) for name in EXTRA if name in recipe}
    options = check_options({name: value for name, value in recipe.items() if name not in EXTRA})
    dims = {"image_dim": store.images.shape[1], "text_dim": store.texts.shape[2]}
    settings, _ = choose_settings({"seed": split, **options}, rows=len(rows.images), **dims)
    model, curve = train(rows, chosen_on, test, settings, extra)
    beta = max(BETAS, key=lambda each: recalled(model, chosen_on, rows, each).mean())
    hits = {"plain": recalled(model, test), "corrected": recalled(model, test, rows, beta)}
    step = max(curve, key=lambda each: each["mrr"])["step"]
    return {
        "step": step,
        "beta": beta,
        "of": settings.steps,
        "curve": curve,
        **{name: each.tolist() for name, each in hits.items()},
    }


def main() -> None:
    """Train, score and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--features", type=Path, required=True, help="store")
    options.add_argument("--rows", default="500,1000", help="numbers of pairs")
    options.add_argument("--splits", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/presets.jsonl"), help="file of finished trials")
    options.add_argument("--seconds", type=float, default=1e9, help="time after which no trial is begun")
    options.add_argument("recipes", nargs="+", help="settings as name=value,name=value")
    asked, begun = options.parse_args(), time.monotonic()
    pairs = open_pairs([asked.features])
    images, texts = read_rows(pairs, [each.usable(None) for each in pairs])
    store = Rows(torch.from_numpy(images).float(), torch.from_numpy(texts).float())
    known = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    print("| pairs | recipe | R@1 | difference | corrected | difference | best step |\n|---|---|---|---|---|---|---|")
    for count in map(int, asked.rows.split(",")):
        first: dict[str, NDArray[np.float64]] = {}
        trials_of: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in asked.recipes}
        for split in range(asked.splits):
            for recipe in asked.recipes:
                key = [str(asked.features), count, split, recipe]
                found = next((each for each in known if each["key"] == key), None)
                if found is None and time.monotonic() - begun > asked.seconds:
                    continue
                if found is None:
                    settings = dict(each.split("=") for each in recipe.split(",") if each)
                    found = {"key": key, **trial(store, count, split, settings)}
                    with asked.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                trials_of[recipe].append(found)
        for recipe, trials in trials_of.items():
            if not trials:
                continue
            cells = []
            for name in ("plain", "corrected"):
                hits = 100 * np.stack([each[name] for each in trials])
                first.setdefault(name, hits)
                low, high = mean_interval((hits - first[name][: len(hits)]).flatten())
                difference = (hits - first[name][: len(hits)]).mean()
                cells += [f"{hits.mean():.1f}", f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"]
            steps = ", ".join(f"{each['step']}/{each['of']}" for each in trials)
            print(f"| {count:,} | {recipe} | {' | '.join(cells)} | {steps} |", flush=True)


if __name__ == "__main__":
    main()
