"""The linear alignment probe: rank frozen encoders by how well linear heads of one fixed recipe align them.

Zhang et al., *Assessing and Learning Alignment of Unimodal Vision and Language Models* (2024). The recipe is that of
their released script: linear heads, sigmoid loss, Lion with a weight decay of 1e-7, warm-up over 10 % of the steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from sail_align.align.analysis.trials import FORMAT, Trial, TrialResult, TrialRunner, base_recipe, held_out_by_all
from sail_align.align.data.pairs import Rows
from sail_align.align.stats.tables import format_table, mean_std
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError
from sail_align.extract.store.joined import has_encoders
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
        """Name of its runs."""
        return f"{self.store.stem} {self.image} {self.text} {self.caption}"

    @classmethod
    def select(
        cls,
        stores: Sequence[Path],
        image_encoders: Sequence[str],
        text_encoders: Sequence[str],
        captions: Sequence[str],
    ) -> list["Combination"]:
        """Return the requested combinations of the stores. An empty list of names selects all of them.

        A name may join several encoders of a store, as in `a+b`.

        Raises:
            UserError: A path is not a store, or no combination matches the request.
        """
        paths = ", ".join(map(str, stores))
        opened = {path: Store.open(path) for path in stores}
        known = {
            "image encoder": {name for store in opened.values() for name in store.images()},
            "text encoder": {n for store in opened.values() for each in store.captions for n in store.texts(each)},
            "caption": {name for store in opened.values() for name in store.captions if store.texts(name)},
        }
        requested = zip(known.items(), (image_encoders, text_encoders, captions), strict=True)
        for (kind, there), names in requested if all(known.values()) else ():
            if missing := next((name for name in names if not has_encoders(there, name)), None):
                raise UserError(
                    f"{paths} has no features of {kind} {missing!r}. Available: {', '.join(sorted(there))}."
                )
        found = []
        for path, store in opened.items():
            images = store.images()
            for image in image_encoders or images:
                for caption in captions or store.captions:
                    texts = store.texts(caption) if caption in store.captions else {}
                    chosen = [text for text in text_encoders or texts if has_encoders(texts, text)]
                    found += [cls(path, image, text, caption) for text in chosen if has_encoders(images, image)]
        if not found:
            raise UserError(
                f"{paths} has no such combination of image features, text features and caption. See `sail-extract "
                "status`."
            )
        return found


@dataclass(frozen=True)
class Probe:
    """The results of all combinations, the best first. `recipe` has the options of the fits."""

    ranking: Sequence[tuple[Combination, TrialResult]]
    recipe: Mapping[str, Any]

    @classmethod
    def run(cls, combinations: Sequence[Combination], given: Mapping[str, Any], runner: TrialRunner) -> "Probe":
        """Train and score linear heads for each combination. Finished runs are reused.

        Combinations of one store are scored on the same held-out pairs.

        Args:
            combinations: At least one.
            given: Fit options; they override those of the recipe.
            runner: Trains and scores the heads.

        Raises:
            UserError: The disk has too little free space, or an option or an array cannot be used. Raised before the
                first fit.
        """
        options = {**RECIPE, **given}
        trials: list[Trial] = []
        known_copies: dict[str, list[Rows]] = {}
        by_store: dict[Path, list[Trial]] = {}
        for each in combinations:
            plan, notes = make_plan(
                [each.store],
                base_recipe([each.store], options),
                captions=[each.caption],
                image_encoder=each.image,
                text_encoder=each.text,
                known_copies=known_copies,
            )
            for note in notes if not trials else ():
                typer.echo(f"note: {note}")
            trials.append(Trial(each.name, plan))
            by_store.setdefault(each.store, []).append(trials[-1])
        scored = {store: held_out_by_all(of_store) for store, of_store in by_store.items()}
        features = (  # read when their turn comes
            {each.caption: trial.read(scored[each.store])} for each, trial in zip(combinations, trials, strict=True)
        )
        ranking = list(zip(combinations, runner.run(trials, features), strict=True))
        ranking.sort(key=lambda pair: -np.mean(pair[1].mean_recalls(pair[0].caption)))
        return cls(ranking, options)

    def table(self) -> str:
        """Return the ranking as Markdown."""
        rows = []
        for rank, (which, result) in enumerate(self.ranking, start=1):
            low, high = result.interval(which.caption)
            recalls = map(mean_std, result.recalls(which.caption))
            mean = f"{mean_std(result.mean_recalls(which.caption))} ({low:.1f} – {high:.1f})"
            names = (str(rank), which.store.stem, which.image, which.text, which.caption)
            rows.append((*names, f"{result.pairs:,}", *recalls, mean, f"{result.chance:.2f}"))
        return format_table(HEADER, rows, "lllll")

    def record(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        ranking = []
        for which, result in self.ranking:
            t2i, i2t = result.recalls(which.caption)
            ranking.append(
                {
                    "store": str(which.store),
                    "store_digest": Store.open(which.store).digest,
                    "image": which.image,
                    "text": which.text,
                    "caption": which.caption,
                    "pairs": result.pairs,
                    "chance": result.chance,
                    "r1": float(np.mean(result.mean_recalls(which.caption))),
                    "interval": result.interval(which.caption),
                    "t2i_r1": t2i,
                    "i2t_r1": i2t,
                    "runs": result.digests,
                }
            )
        return {"format": FORMAT, "protocol": "probe-1", "recipe": self.recipe, "ranking": ranking}
