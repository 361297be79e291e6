r"""Add ideas of other methods to our own recipe, and compare on held-out training images.

Each seed has its own split and trains each variant once. The table has the paired difference of the mean R@1 to our
recipe, in points, with a 95 % interval over the images (an image that several splits hold out is drawn as one group).
Finished fits are reused; rerun the command to resume.

    python benchmarks/peer_ideas.py --train features/flickr8k-train.zarr --out runs/peer-ideas
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_recipes import (
    LION,
    Data,
    Recipe,
    from_closed_form,
    fusemix_heads,
    mixup,
    noise,
    sharelock_heads,
    structure,
    trained,
)
from peers import Hits, read_data, score, slug, split
from torch import Tensor, nn

from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.loss import LossValue, sigmoid_loss
from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.align.stats.tables import format_interval, format_table, mean_std, number

BETA = 20.0


class Sum(nn.Module):
    """The sum of two heads. The second one's output layer starts at zero, so that the sum starts as the first."""

    def __init__(self, head: nn.Module, added: nn.Sequential):
        super().__init__()
        nn.init.zeros_(added[-1].weight)
        nn.init.zeros_(added[-1].bias)
        self.head, self.added = head, added

    def forward(self, features: Tensor) -> Tensor:
        """Return the sum of the outputs."""
        return self.head(features) + self.added(features)


def with_adapters(data: Data, make: Callable[..., AlignmentModel], *, image: bool = True) -> AlignmentModel:
    """Return our linear heads from the closed form, plus the heads of another method."""
    model = from_closed_form(data)
    other = make(data, dim=model.text_head.out.out_features)
    if image:
        model.image_head = Sum(model.image_head, other.image_head)
    model.text_head = Sum(model.text_head, other.text_head)
    return model


def smoothed_loss(image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor, share: float = 0.1) -> LossValue:
    """Return the sigmoid loss with labels of 1 − `share` for the right pairs.

    As log σ(−l) = log σ(l) − l, smoothing adds `share` times the logits of the right pairs.
    """
    value = sigmoid_loss(image_BE, text_CBE, log_scale, bias)
    logits_CB = log_scale.exp() * (image_BE * text_CBE).sum(-1) + bias
    return value._replace(total=value.total + share * logits_CB.sum() / len(image_BE) ** 2)


def _idea(name: str, build: Callable[[Data], AlignmentModel] = from_closed_form, **changed: Any) -> Recipe:
    loop = {"build": build, "loss": sigmoid_loss, "captions": 2, "epochs": 12, **LION, **changed}
    return trained(name, (2e-5,), **loop).with_power()


OURS_HERE = _idea("ours: linear, closed-form start, sigmoid, two captions a step")
IDEAS = (
    _idea("label smoothing 0.1", loss=smoothed_loss),
    _idea("feature noise 0.3", augment=noise),
    _idea("FuseMix's mixup", augment=mixup),
    _idea("STRUCTURE's penalty, weight 0.003", penalty=partial(structure, weight=0.003)),
    _idea("STRUCTURE's penalty, weight 0.03", penalty=partial(structure, weight=0.03)),
    _idea("ShareLock's MLP on the text", partial(with_adapters, make=sharelock_heads, image=False)),
    _idea("FuseMix's adapters, 384 components", partial(with_adapters, make=partial(fusemix_heads, components=384))),
    _idea("GLU ×8", partial(from_closed_form, expansion=8), epochs=8),
)


def hits_of(recipe: Recipe, data: Data, seed: int, folder: Path) -> dict[str, Hits]:
    """Return the hits on the images that a seed holds out, by way of scoring."""
    path = folder / f"{slug(recipe.name)}.{seed}.npz"
    if not path.exists():
        powered, held = data.powered(recipe.power), torch.from_numpy(split(len(data.image), seed))
        inner, outer = powered.rows(~held), powered.rows(held)
        model = recipe.fit(inner, recipe.grid[0], seed, lambda _step, _model: False)
        with torch.no_grad():
            found = score(model, inner, outer, [BETA])
        np.savez(path, cosine=found["cosine"], bank=found[f"{BETA:g}"])
    with np.load(path) as saved:
        return dict(saved)


def main() -> None:
    """Train, score and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--train", type=Path, required=True, help="store to train on")
    options.add_argument("--out", type=Path, default=Path("runs/peer-ideas"), help="folder for results")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", nargs="*", help="parts of the names of ideas")
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no further fit after this time")
    asked = options.parse_args()
    deadline = time.monotonic() + 60 * asked.minutes
    asked.out.mkdir(parents=True, exist_ok=True)
    data = read_data(asked.train)
    images = np.concatenate([np.flatnonzero(split(len(data.image), seed)) for seed in range(asked.seeds)])
    ideas = [each for each in IDEAS if not asked.only or any(part in each.name for part in asked.only)]
    base: list[dict[str, Hits]] = []
    rows = []
    for recipe in (OURS_HERE, *ideas):
        found = []
        for seed in range(asked.seeds):
            if time.monotonic() < deadline:
                found.append(hits_of(recipe, data, seed, asked.out))
        if len(found) < asked.seeds:
            continue
        base = base or found
        cells = [recipe.name]
        for way in ("cosine", "bank"):
            cells.append(mean_std([100 * float(each[way].mean()) for each in found]))
            gain_M = np.concatenate(
                [ours[way].mean(1) - its[way].mean(1) for ours, its in zip(found, base, strict=True)]
            )
            draws = bootstrap([partial(weighted_mean, 100 * gain_M)], len(gain_M), groups_N=images)
            bounds = format_interval(interval(draws[:, 0]), sign="+")
            cells.append("" if found is base else f"{number(100 * gain_M.mean(), sign='+')} ({bounds})")
        rows.append(cells)
        print(" | ".join(cells), flush=True)
    table = format_table(("variant", "R@1", "difference", "with a bank", "difference"), rows)
    (asked.out / "ideas.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
