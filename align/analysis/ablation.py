"""The paper's ablation, step by step, on any store: the effect of the head, the loss and the captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import typer

from sail_align.align.analysis.trials import FORMAT, Trial, TrialResult, TrialRunner, base_recipe, held_out_by_all
from sail_align.align.data.pairs import Rows
from sail_align.align.stats.charts import dot_chart
from sail_align.align.stats.tables import format_table, mean_std
from sail_align.align.train.plan import make_plan

RAW, LONG = "raw", "long"


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: its options beside the shared recipe, and the kinds of captions to train on.

    `paper` is the R@1 that the paper reports, text → image and image → text (2.2 M pairs of CC3M, scored on COCO).
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
class Ladder:
    """The results of all rungs, scored on the same held-out pairs. `about` is the request, ready for JSON."""

    rungs: Sequence[Rung]
    results: Sequence[TrialResult]
    about: Mapping[str, Any]

    @classmethod
    def run(
        cls,
        stores: Sequence[Path],
        given: Mapping[str, Any],
        runner: TrialRunner,
        *,
        kinds: Mapping[str, str],
        image_encoder: str | None = None,
        text_encoder: str | None = None,
    ) -> "Ladder":
        """Train and score each rung with each seed. Finished runs are reused.

        Args:
            stores: At least one.
            given: Fit options that all rungs share; they override those of `base_recipe`.
            runner: Trains and scores the rungs.
            kinds: The stores' captions of kind `raw` and, if there are any, `long`. Rungs of a missing kind are left
                out.
            image_encoder: Image encoder to use if a store has more than one.
            text_encoder: Text encoder to use if a store has more than one.

        Raises:
            UserError: The disk has too little free space, or an option or a store cannot be used. Raised before the
                first fit.
        """
        recipe = base_recipe(stores, given)
        rungs = [rung for rung in LADDER if kinds.keys() >= set(rung.captions)]
        trials: list[Trial] = []
        known_copies: dict[str, list[Rows]] = {}
        for rung in rungs:
            plan, notes = make_plan(
                stores,
                {**recipe, **rung.options},
                captions=[kinds[kind] for kind in rung.captions],
                image_encoder=image_encoder,
                text_encoder=text_encoder,
                known_copies=known_copies,
            )
            for note in notes if not trials else ():
                typer.echo(f"note: {note}")
            trials.append(Trial(rung.name, plan))
        scored = held_out_by_all(trials)
        features = {
            trial.plan.pairs[0].captions[0]: trial.read(scored)
            for trial in trials
            if len(trial.plan.pairs[0].captions) == 1
        }
        about = {
            "stores": [str(each.store.path) for each in trials[0].plan.pairs],
            "store_digests": [each.store.digest for each in trials[0].plan.pairs],
            "captions": dict(kinds),
            "recipe": recipe,
        }
        return cls(rungs, runner.run(trials, repeat(features)), about)

    @property
    def captions(self) -> list[str]:
        """Captions that the rungs are scored on."""
        return list(self.results[0].hits)

    def table(self) -> str:
        """Return R@1 in percent, mean ± standard deviation over the seeds, as Markdown."""
        columns = [f"{caption}: {way} R@1" for caption in self.captions for way in ("T2I", "I2T")]
        rows = []
        for rung, result in zip(self.rungs, self.results, strict=True):
            cells = [mean_std(values) for caption in self.captions for values in result.recalls(caption)]
            rows.append((result.label, *cells, "{:.1f} / {:.1f}".format(*rung.paper)))
        return format_table(("rung", *columns, "paper, CC3M → COCO"), rows)

    def explanation(self) -> str:
        """Explain the numbers of the table in a paragraph."""
        first, seeds = self.results[0], len(self.results[0].digests)
        over_seeds = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        text = (
            f"R@1 in % on {first.pairs:,} pairs that no rung was trained on (chance {first.chance:.2f}), by caption; "
            f"{over_seeds}. The last column has the paper's numbers, text → image / image → text."
        )
        if any(any(result.collapsed) for result in self.results):
            text += " The numbers of collapsed runs reflect the recipe, not the rung. Lower --lr."
        return text

    def chart(self) -> str:
        """Draw R@1 by rung on the first caption; return the SVG."""
        series = {}
        for way, name in enumerate(("text → image", "image → text")):
            values = [result.recalls(self.captions[0])[way] for result in self.results]
            series[name] = [(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0) for v in values]
        labels = [result.label for result in self.results]
        return dot_chart(labels, series, f"R@1 (%), captions {self.captions[0]}")

    def record(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        ways, first = ("t2i_r1", "i2t_r1"), self.results[0]
        rungs = [
            {
                "name": rung.name,
                "options": dict(rung.options),
                "captions": list(rung.captions),
                "runs": result.digests,
                "collapsed": result.collapsed,
                "scores": {caption: dict(zip(ways, result.recalls(caption), strict=True)) for caption in self.captions},
                "paper": dict(zip(ways, rung.paper, strict=True)),
            }
            for rung, result in zip(self.rungs, self.results, strict=True)
        ]
        shared = {"pairs": first.pairs, "chance": first.chance, "seeds": len(first.digests)}
        return {"format": FORMAT, "protocol": "ladder-1", **self.about, **shared, "rungs": rungs}
