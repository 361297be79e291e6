"""The linear alignment probe: which frozen encoders are brought together best by linear heads of one fixed recipe.

Zhang et al., *Assessing and Learning Alignment of Unimodal Vision and Language Models* (2024). The recipe is that of
their released script: linear heads, sigmoid loss, Lion with a weight decay of 1e-7, warm-up over 10 % of the steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sail_align.align.analysis.trials import (
    FORMAT,
    Retrieved,
    Say,
    Trial,
    base_recipe,
    finished_run,
    held_out_by_all,
    read_scored,
    require_room,
    retrieve,
    spread,
)
from sail_align.align.data.pairs import Pairs
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.tables import markdown_table
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

RECIPE = {"head": "linear", "loss": "sigmoid", "weight_decay": 1e-7, "warmup": 0.1}
HEADER = ("rank", "store", "image", "text", "caption", "pairs", "T2I R@1", "I2T R@1", "mean (95 % interval)", "chance")


@dataclass(frozen=True)
class Combination:
    """An image encoder with one caption of a text encoder, in one store."""

    store: Path
    image: str
    text: str
    caption: str

    @property
    def name(self) -> str:
        """Names its runs."""
        return f"{self.store.stem} {self.image} {self.text} {self.caption}"


@dataclass(frozen=True)
class Probed:
    """What linear heads made of a combination: of every seed, on `pairs` held-out pairs."""

    combination: Combination
    pairs: int
    digests: Sequence[str]
    retrieved: Sequence[Retrieved]

    @property
    def r1_by_seed(self) -> list[float]:
        """R@1 in percent, the mean over both ways."""
        return [(each.t2i_r1 + each.i2t_r1) / 2 for each in self.retrieved]

    @property
    def r1(self) -> float:
        """Its mean over the seeds."""
        return float(np.mean(self.r1_by_seed))

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval over the held-out pairs."""
        hits_N = np.mean([[each.text_to_image, each.image_to_text] for each in self.retrieved], axis=(0, 1))
        low, high = mean_interval(hits_N)
        return 100 * low, 100 * high


def combinations(
    stores: Sequence[Path], image_encoders: Sequence[str], text_encoders: Sequence[str], captions: Sequence[str]
) -> list[Combination]:
    """Return those of the stores' combinations that are asked for; nothing asked of a kind asks for all of it.

    Raises:
        UserError: A path is no store, or there is no such combination.
    """
    there = []
    for path in stores:
        store = Store.open(path)
        texts = [(caption, node) for caption in store.captions for node in store.texts(caption)]
        there += [Combination(path, image, text, caption) for image in store.images() for caption, text in texts]
    asked = {"image": image_encoders, "text": text_encoders, "caption": captions}
    for side, names in asked.items() if there else ():
        known = dict.fromkeys(getattr(each, side) for each in there)
        if lacking := next((name for name in names if name not in known), None):
            what = side if side == "caption" else f"{side} encoder"
            has = f"{' with '.join(map(str, stores))} has no features of {what} {lacking!r}"
            raise UserError(f"{has}; it has {', '.join(known)}.")
    found = [each for each in there if all(not asked[side] or getattr(each, side) in asked[side] for side in asked)]
    if not found:
        raise UserError(
            f"{', '.join(map(str, stores))} has no such image features, captions and text features together; see "
            "`sail-extract status` for what is there."
        )
    return found


def probe(
    asked: Sequence[Combination],
    folder: Path,
    given: Mapping[str, Any],
    *,
    seeds: int,
    device: torch.device,
    say: Say,
    quiet: bool = False,
) -> list[Probed]:
    """Train linear heads for each combination under a folder, or take the runs that are there; return them ranked.

    Combinations of one store are scored on the same held-out pairs. The best is the first.

    Raises:
        UserError: The disk is too full, or an option or an array cannot be used; found before the first fit.
    """
    trials: dict[Combination, Trial] = {}
    for each in asked:
        options = {**base_recipe([each.store], given), **RECIPE}
        plan, notes = make_plan(
            [each.store],
            {**options, **given},
            captions=[each.caption],
            image_encoder=each.image,
            text_encoder=each.text,
        )
        for note in notes if not trials else ():
            say(f"note: {note}")
        trials[each] = Trial(each.name, plan)
    require_room(list(trials.values()), folder, seeds, say)
    scored = {
        store: held_out_by_all([trial for each, trial in trials.items() if each.store == store])
        for store in dict.fromkeys(each.store for each in asked)
    }
    probed = []
    for number, (each, trial) in enumerate(trials.items(), start=1):
        pairs: Sequence[Pairs] = trial.plan.pairs
        image_ND, text_ND = read_scored(pairs, scored[each.store])
        digests, retrieved = [], []
        for seed in range(seeds):
            run, there = finished_run(trial.seeded(seed), folder, each.name, device=device, quiet=quiet)
            digests.append(run.digest)
            retrieved.append(retrieve(run, image_ND, text_ND, device))
            found = f"{retrieved[-1].t2i_r1:.1f} / {retrieved[-1].i2t_r1:.1f}{' (was there)' if there else ''}"
            say(f"{number}/{len(trials)} {each.name}, seed {seed}: T2I / I2T R@1 {found}")
        probed.append(Probed(each, len(image_ND), digests, retrieved))
    return sorted(probed, key=lambda one: -one.r1)


def table(probed: Sequence[Probed]) -> str:
    """Return the ranking as Markdown."""
    rows = []
    for rank, each in enumerate(probed, start=1):
        low, high = each.interval
        of = each.combination
        recalls = [spread([one.t2i_r1 for one in each.retrieved]), spread([one.i2t_r1 for one in each.retrieved])]
        mean = f"{spread(each.r1_by_seed)} ({low:.1f} – {high:.1f})"
        rows.append(
            (
                f"{rank}",
                of.store.stem,
                of.image,
                of.text,
                of.caption,
                f"{each.pairs:,}",
                *recalls,
                mean,
                f"{100 / each.pairs:.2f}",
            )
        )
    return markdown_table(HEADER, rows, words=5)


def record(probed: Sequence[Probed], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all numbers as JSON-able data."""
    return {
        "format": FORMAT,
        "protocol": "probe-1",
        "recipe": {**RECIPE, **given},
        "ranking": [
            {
                "store": str(each.combination.store),
                "store_digest": Store.open(each.combination.store).digest,
                "image": each.combination.image,
                "text": each.combination.text,
                "caption": each.combination.caption,
                "pairs": each.pairs,
                "chance": 100 / each.pairs,
                "r1": each.r1,
                "interval": each.interval,
                "t2i_r1": [one.t2i_r1 for one in each.retrieved],
                "i2t_r1": [one.i2t_r1 for one in each.retrieved],
                "runs": list(each.digests),
            }
            for each in probed
        ],
    }
