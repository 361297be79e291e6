"""The linear alignment probe: rank frozen encoders by how well linear heads of one fixed recipe align them.

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
    Echo,
    Trial,
    TrialResult,
    base_recipe,
    held_out_by_all,
    read_scored,
    run_trials,
)
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.tables import format_table, mean_std
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

        Raises:
            UserError: A path is not a store, or no combination matches the request.
        """
        available = []
        for path in stores:
            store = Store.open(path)
            texts = [(caption, node) for caption in store.captions for node in store.texts(caption)]
            available += [cls(path, image, text, caption) for image in store.images() for caption, text in texts]
        requested = {"image": image_encoders, "text": text_encoders, "caption": captions}
        paths = ", ".join(map(str, stores))
        for side, names in requested.items() if available else ():
            known = dict.fromkeys(getattr(each, side) for each in available)
            if missing := next((name for name in names if name not in known), None):
                kind = side if side == "caption" else f"{side} encoder"
                raise UserError(f"{paths} has no features of {kind} {missing!r}. Available: {', '.join(known)}.")
        found = [
            each
            for each in available
            if all(not names or getattr(each, side) in names for side, names in requested.items())
        ]
        if not found:
            raise UserError(
                f"{paths} has no such combination of image features, text features and caption. See `sail-extract "
                "status`."
            )
        return found


@dataclass(frozen=True)
class ProbeScore:
    """The result of linear heads on a combination."""

    combination: Combination
    result: TrialResult

    @property
    def recalls(self) -> tuple[list[float], list[float]]:
        """R@1 by seed in percent, text → image and image → text."""
        return self.result.recalls(self.combination.caption)

    @property
    def r1_by_seed(self) -> list[float]:
        """R@1 by seed in percent, the mean of both ways."""
        return [(t2i + i2t) / 2 for t2i, i2t in zip(*self.recalls, strict=True)]

    @property
    def r1(self) -> float:
        """Mean of `r1_by_seed`."""
        return float(np.mean(self.r1_by_seed))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `r1` over the held-out pairs."""
        retrieved = self.result.retrieved[self.combination.caption]
        hits_N = np.mean([[each.text_to_image, each.image_to_text] for each in retrieved], axis=(0, 1))
        low, high = mean_interval(hits_N)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class ProbeResult:
    """Scores of all combinations, the best first. `recipe` has the options of the fits."""

    scores: Sequence[ProbeScore]
    recipe: Mapping[str, Any]

    def table(self) -> str:
        """Return the ranking as Markdown."""
        rows = []
        for rank, score in enumerate(self.scores, start=1):
            which, pairs = score.combination, score.result.pairs
            low, high = score.interval
            mean = f"{mean_std(score.r1_by_seed)} ({low:.1f} – {high:.1f})"
            names = (str(rank), which.store.stem, which.image, which.text, which.caption)
            rows.append((*names, f"{pairs:,}", *map(mean_std, score.recalls), mean, f"{100 / pairs:.2f}"))
        return format_table(HEADER, rows, "lllll")

    def record(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        ranking = [
            {
                "store": str(score.combination.store),
                "store_digest": Store.open(score.combination.store).digest,
                "image": score.combination.image,
                "text": score.combination.text,
                "caption": score.combination.caption,
                "pairs": score.result.pairs,
                "chance": 100 / score.result.pairs,
                "r1": score.r1,
                "interval": score.interval,
                "t2i_r1": score.recalls[0],
                "i2t_r1": score.recalls[1],
                "runs": score.result.digests,
            }
            for score in self.scores
        ]
        return {"format": FORMAT, "protocol": "probe-1", "recipe": self.recipe, "ranking": ranking}


def run_probe(
    combinations: Sequence[Combination],
    folder: Path,
    given: Mapping[str, Any],
    *,
    seeds: int,
    device: torch.device,
    echo: Echo,
    quiet: bool = False,
) -> ProbeResult:
    """Train and score linear heads for each combination. Finished runs are reused.

    Combinations of one store are scored on the same held-out pairs.

    Args:
        combinations: At least one.
        folder: Folder for the runs.
        given: Fit options; they override those of the recipe.
        seeds: Number of runs of each combination.
        device: Device to train on.
        echo: Called with a line after each run.
        quiet: Show no progress bars.

    Raises:
        UserError: The disk has too little free space, or an option or an array cannot be used. Raised before the first
            fit.
    """
    options = {**RECIPE, **given}
    trials: list[Trial] = []
    by_store: dict[Path, list[Trial]] = {}
    for each in combinations:
        plan, notes = make_plan(
            [each.store],
            base_recipe([each.store], options),
            captions=[each.caption],
            image_encoder=each.image,
            text_encoder=each.text,
        )
        for note in notes if not trials else ():
            echo(f"note: {note}")
        trials.append(Trial(each.name, plan))
        by_store.setdefault(each.store, []).append(trials[-1])
    scored = {store: held_out_by_all(of_store) for store, of_store in by_store.items()}
    features = (  # read when their turn comes
        {each.caption: read_scored(trial.plan.pairs, scored[each.store])}
        for each, trial in zip(combinations, trials, strict=True)
    )
    results = run_trials(trials, features, folder, seeds=seeds, device=device, echo=echo, quiet=quiet)
    scores = [ProbeScore(each, result) for each, result in zip(combinations, results, strict=True)]
    return ProbeResult(sorted(scores, key=lambda score: -score.r1), options)
