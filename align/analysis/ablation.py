"""The paper's ablation, step by step, on any store: which head, loss and captions are worth how much."""

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
from sail_align.align.stats.charts import dot_chart
from sail_align.align.stats.tables import markdown_table
from sail_align.align.train.collapse import collapse_of
from sail_align.align.train.plan import make_plan

RAW, LONG = "raw", "long"


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: options beside the recipe that all rungs share, and the kinds of captions trained on.

    `paper` is R@1 text → image and image → text that the paper reports (2.2 M pairs of CC3M, scored on COCO).
    """

    name: str
    options: Mapping[str, Any]
    captions: tuple[str, ...]
    paper: tuple[float, float]


_GLU8 = {"head": "glu", "expansion": 8}
_SIGMOID = {**_GLU8, "loss": "sigmoid", "divisor": "pairs"}
LADDER = (
    Rung("linear, InfoNCE", {"head": "linear", "loss": "infonce"}, (RAW,), (11.1, 13.5)),
    Rung("MLP ×4", {"head": "mlp", "expansion": 4, "loss": "infonce"}, (RAW,), (8.0, 10.7)),
    Rung("GLU ×4", {"head": "glu", "expansion": 4, "loss": "infonce"}, (RAW,), (11.5, 17.4)),
    Rung("GLU ×8", {**_GLU8, "loss": "infonce"}, (RAW,), (16.1, 22.5)),
    Rung("+ sigmoid", {**_GLU8, "loss": "sigmoid", "divisor": "batch"}, (RAW,), (25.4, 36.0)),
    Rung("+ 1/B²", _SIGMOID, (RAW,), (26.2, 36.7)),
    Rung("long captions only", _SIGMOID, (LONG,), (31.4, 44.2)),
    Rung("+ multi-positive", _SIGMOID, (RAW, LONG), (32.9, 45.4)),
)


@dataclass(frozen=True)
class Climbed:
    """A rung with its runs: for each caption that was scored, what every seed retrieved, and which seeds collapsed."""

    rung: Rung
    digests: Sequence[str]
    retrieved: Mapping[str, Sequence[Retrieved]]
    collapsed: Sequence[bool]

    @property
    def label(self) -> str:
        """The rung's name, and if the training of a seed collapsed, of how many."""
        count = sum(self.collapsed)
        return self.rung.name + (f" (collapsed {count}/{len(self.collapsed)})" if count else "")

    def recalls(self, caption: str) -> tuple[list[float], list[float]]:
        """Return R@1 by seed, text → image and image → text, in percent."""
        found = self.retrieved[caption]
        return [each.t2i_r1 for each in found], [each.i2t_r1 for each in found]


@dataclass(frozen=True)
class Ladder:
    """All rungs climbed, scored on the same `pairs` held-out pairs; `about` is what was asked for, JSON-able."""

    climbed: Sequence[Climbed]
    captions: Sequence[str]
    pairs: int
    seeds: int
    about: Mapping[str, Any]

    @property
    def chance(self) -> float:
        """R@1 of guessing, in percent."""
        return 100 / self.pairs

    def table(self) -> str:
        """Return R@1 in percent, mean ± standard deviation over the seeds, as Markdown."""
        ways = [f"{caption}: {way} R@1" for caption in self.captions for way in ("T2I", "I2T")]
        rows = []
        for each in self.climbed:
            cells = [spread(values) for caption in self.captions for values in each.recalls(caption)]
            rows.append((each.label, *cells, "{:.1f} / {:.1f}".format(*each.rung.paper)))
        return markdown_table(("rung", *ways, "paper, CC3M → COCO"), rows)

    def explanation(self) -> str:
        """Say in a paragraph what the table's numbers are."""
        seeds = f"mean ± standard deviation over {self.seeds} seeds" if self.seeds > 1 else "one seed"
        collapsed = any(any(each.collapsed) for each in self.climbed)
        return (
            f"R@1 in % on {self.pairs:,} pairs that no rung trained on (chance {self.chance:.2f}), by the caption that "
            f"is looked up or looked for; {seeds}. The last column is the paper's, text → image / image → text."
        ) + (" Where training collapsed the numbers tell of the recipe, not of the rung: lower --lr." * collapsed)

    def chart(self) -> str:
        """Draw R@1 by rung, on the first caption, as SVG."""
        series = {}
        for way, name in enumerate(("text → image", "image → text")):
            values = [each.recalls(self.captions[0])[way] for each in self.climbed]
            series[name] = [(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0) for v in values]
        return dot_chart([each.label for each in self.climbed], series, f"R@1 (%), captions {self.captions[0]}")

    def record(self) -> dict[str, Any]:
        """Return all numbers as JSON-able data."""
        rungs = [
            {
                "name": each.rung.name,
                "options": dict(each.rung.options),
                "captions": list(each.rung.captions),
                "runs": list(each.digests),
                "collapsed": list(each.collapsed),
                "scores": {
                    caption: dict(zip(("t2i_r1", "i2t_r1"), each.recalls(caption), strict=True))
                    for caption in self.captions
                },
                "paper": dict(zip(("t2i_r1", "i2t_r1"), each.rung.paper, strict=True)),
            }
            for each in self.climbed
        ]
        shared = {"pairs": self.pairs, "chance": self.chance, "seeds": self.seeds}
        return {"format": FORMAT, "protocol": "ladder-1", **self.about, **shared, "rungs": rungs}


def climb(
    stores: Sequence[Path],
    folder: Path,
    given: Mapping[str, Any],
    *,
    kinds: Mapping[str, str],
    seeds: int,
    device: torch.device,
    say: Say,
    quiet: bool = False,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
) -> Ladder:
    """Train every rung with every seed under a folder, or take the runs that are there; score them.

    Args:
        stores: At least one.
        folder: Where the runs go.
        given: Options of a fit that all rungs share, over those of `base_recipe`.
        kinds: Which of the stores' captions are `raw` and, if there are such, `long`; rungs of the others are left out.
        seeds: Runs a rung.
        device: Where to train.
        say: Takes a sentence after each run.
        quiet: No progress bars.
        image_encoder: Which encoder's images, where a store holds several.
        text_encoder: The same for texts.

    Raises:
        UserError: The disk is too full, or an option or a store cannot be used; found before the first fit.
    """
    recipe = base_recipe(stores, given)
    trials, rungs = [], [rung for rung in LADDER if kinds.keys() >= set(rung.captions)]
    for rung in rungs:
        captions = [kinds[kind] for kind in rung.captions]
        plan, notes = make_plan(
            stores,
            {**recipe, **rung.options},
            captions=captions,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
        )
        trials.append(Trial(rung.name, plan))
        for note in notes if rung is rungs[0] else ():
            say(f"note: {note}")
    require_room(trials, folder, seeds, say)
    scored = held_out_by_all(trials)
    features = {
        trial.plan.pairs[0].captions[0]: read_scored(trial.plan.pairs, scored)
        for trial in trials
        if len(trial.plan.pairs[0].captions) == 1
    }
    digests: list[list[str]] = [[] for _ in rungs]
    retrieved: list[dict[str, list[Retrieved]]] = [{caption: [] for caption in features} for _ in rungs]
    collapsed: list[list[bool]] = [[] for _ in rungs]
    for seed in range(seeds):
        for number, trial in enumerate(trials):
            run, there = finished_run(trial.seeded(seed), folder, trial.name, device=device, quiet=quiet)
            digests[number].append(run.digest)
            collapsed[number].append(collapse_of(run.path, run.settings["lr"]) is not None)
            for caption, (image_ND, text_ND) in features.items():
                retrieved[number][caption].append(retrieve(run, image_ND, text_ND, device))
            found = "; ".join(f"{c} {r[-1].t2i_r1:.1f} / {r[-1].i2t_r1:.1f}" for c, r in retrieved[number].items())
            place = f"{seed * len(trials) + number + 1}/{seeds * len(trials)}"
            remarks = f"{', collapsed' if collapsed[number][-1] else ''}{' (was there)' if there else ''}"
            say(f"{place} {trial.name}, seed {seed}: T2I / I2T R@1 {found}{remarks}")
    about = {
        "stores": [str(each.store.path) for each in trials[0].plan.pairs],
        "store_digests": [each.store.digest for each in trials[0].plan.pairs],
        "captions": dict(kinds),
        "recipe": recipe,
    }
    climbed = [Climbed(*each) for each in zip(rungs, digests, retrieved, collapsed, strict=True)]
    return Ladder(climbed, list(features), sum(int(rows.sum()) for rows in scored), seeds, about)
