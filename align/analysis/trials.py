"""Fits that are compared with each other: one recipe except for what is compared, scored on the same held-out rows."""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from sail_align.align.data.pairs import Half, Rows, read_rows
from sail_align.align.runs.checkpoint import Checkpoint, Run, load_run
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import COMPARED, COMPARED_FEW, PAPER_ROWS
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import ranks
from sail_align.align.train.collapse import Watch
from sail_align.align.train.plan import Plan
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError, format_bytes
from sail_align.extract.store.store import Store

FORMAT = 1
EMBED_ROWS = 1_024

Hits = NDArray[np.bool_]
"""Two rows (2, N): which held-out captions rank their own image first, and which images their own caption."""


@dataclass(frozen=True)
class Trial:
    """A named recipe and its plan, which is run with one or several seeds."""

    name: str
    plan: Plan

    def seeded(self, seed: int) -> Plan:
        """Return the plan with a seed."""
        return replace(self.plan, settings=replace(self.plan.settings, seed=seed))

    def read(self, rows: Sequence[Rows]) -> tuple[Half, Half]:
        """Return the images (N, D_I) and the texts (N, D_T) of the first caption of some rows of the stores."""
        images, texts = read_rows([each.only(each.captions[:1]) for each in self.plan.pairs], rows)
        return images, texts[0]


@dataclass(frozen=True)
class TrialResult:
    """The runs of a trial in the order of their seeds, and their hits among `pairs` held-out pairs of each caption."""

    name: str
    pairs: int
    digests: list[str]
    collapsed: list[bool]
    hits: Mapping[str, list[Hits]]

    @property
    def label(self) -> str:
        """The trial's name, with the number of collapsed runs if there are any."""
        count = sum(self.collapsed)
        return self.name + (f" (collapsed {count}/{len(self.collapsed)})" if count else "")

    @property
    def chance(self) -> float:
        """R@1 of a random guess in percent."""
        return 100 / self.pairs

    def recalls(self, caption: str) -> tuple[list[float], list[float]]:
        """Return R@1 by seed in percent, text → image and image → text."""
        t2i, i2t = ([100 * float(hits_2N[way].mean()) for hits_2N in self.hits[caption]] for way in (0, 1))
        return t2i, i2t

    def mean_recalls(self, caption: str) -> list[float]:
        """Return R@1 by seed in percent, the mean of both ways."""
        return [(t2i + i2t) / 2 for t2i, i2t in zip(*self.recalls(caption), strict=True)]

    def interval(self, caption: str) -> tuple[float, float]:
        """Return the 95 % bootstrap interval over the held-out pairs of the mean of `mean_recalls`."""
        low, high = mean_interval(np.mean(self.hits[caption], axis=(0, 1)))
        return 100 * low, 100 * high


def base_recipe(stores: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a fit from random initial weights: the paper's, others for few rows, then those given.

    Raises:
        UserError: A path is not a store.
    """
    few = sum(Store.open(path).rows for path in stores) < PAPER_ROWS
    recipe: dict[str, Any] = {**COMPARED, **(COMPARED_FEW if few else {})}
    if "steps" in given:
        recipe.pop("epochs", None)
    return recipe | dict(given)


@dataclass(frozen=True)
class TrialRunner:
    """Trains and scores trials.

    Attributes:
        folder: Folder for the runs.
        seeds: Number of runs of each trial.
        device: Device to train on.
        quiet: Show no progress bars.
        checkpoint: The weights of a run to keep and score.
    """

    folder: Path
    seeds: int
    device: torch.device
    quiet: bool = False
    checkpoint: Literal["best", "last"] = "last"

    def run(self, trials: Sequence[Trial], features: Iterable[Mapping[str, tuple[Half, Half]]]) -> list[TrialResult]:
        """Train each trial with each seed, unless its run is finished; score the runs and print a line for each.

        Args:
            trials: At least one.
            features: Images (N, D_I) and texts (N, D_T) to score each trial on, by caption.

        Raises:
            UserError: The disk has too little free space.
        """
        self._check_disk(trials)
        results = []
        for number, (trial, sides_of) in enumerate(zip(trials, features, strict=False)):
            pairs = len(next(iter(sides_of.values()))[0])
            result = TrialResult(trial.name, pairs, [], [], {caption: [] for caption in sides_of})
            for seed in range(self.seeds):
                run, was_finished = self.train(trial, seed)
                result.digests.append(run.digest)
                result.collapsed.append(Watch.replay(run.path, run.settings["lr"]) is not None)
                for caption, sides in sides_of.items():
                    result.hits[caption].append(self.retrieve(run, *sides))
                recalls = {caption: [way[-1] for way in result.recalls(caption)] for caption in sides_of}
                scores = "; ".join(f"{caption} {t2i:.1f} / {i2t:.1f}" for caption, (t2i, i2t) in recalls.items())
                place = f"{number * self.seeds + seed + 1}/{len(trials) * self.seeds}"
                collapsed = ", collapsed" if result.collapsed[-1] else ""
                finished = " (already finished)" if was_finished else ""
                typer.echo(f"{place} {trial.name}, seed {seed}: T2I / I2T R@1 {scores}{collapsed}{finished}")
            results.append(result)
        return results

    def find(self, trial: Trial, seed: int) -> tuple[Path, bool]:
        """Return the path of the run of a seed, and whether it is finished.

        The path ends with a digest of everything that decides the weights, so other options give another run.
        """
        words = re.sub(r"\W+", "-", trial.name.replace("×", "x")).strip("-")
        path = self.folder / f"{words}-seed{seed}-{trial.seeded(seed).digest[:8]}"
        saved = Checkpoint.read(path)
        return path, saved is not None and saved.finished

    def train(self, trial: Trial, seed: int) -> tuple[Run, bool]:
        """Return the finished run of a seed, and whether it was finished before. An unfinished run is resumed.

        Of a run that is scored with its last weights, only these are kept.
        """
        path, finished = self.find(trial, seed)
        plan = trial.seeded(seed)
        claimed = claim_run(path, plan.record()).path
        # Of a finished run, this removes what a killed process left.
        fit(plan, claimed, device=self.device, quiet=self.quiet, keep=1, on_collapse="warn")
        for best in RunFolder(path).checkpoints("best") if self.checkpoint == "last" else ():
            RunFolder(best).discard()
        return load_run(path, self.checkpoint), finished

    @torch.no_grad()
    def retrieve(self, run: Run, image_ND: Half, text_ND: Half) -> Hits:
        """Embed pairs with the heads of a run and rank each item among all others; return the hits (2, N)."""
        model = run.model.to(self.device)

        def embedded(encode: Callable[[torch.Tensor], torch.Tensor], features_ND: Half) -> NDArray[np.float32]:
            starts = range(0, len(features_ND), EMBED_ROWS)
            batches = (torch.from_numpy(features_ND[start : start + EMBED_ROWS]) for start in starts)
            return np.concatenate([encode(batch_BD.to(self.device)).cpu().numpy() for batch_BD in batches])

        image_NE, text_NE = embedded(model.encode_image, image_ND), embedded(model.encode_text, text_ND)
        image_ranks, text_ranks = ranks(image_NE, text_NE, np.arange(len(image_NE)))
        hits_2N: Hits = np.stack((text_ranks, image_ranks)) == 0
        return hits_2N

    def _check_disk(self, trials: Sequence[Trial]) -> None:
        """Print the disk space that the missing runs need, or raise `UserError` if there is not enough.

        Each run leaves its heads. During training, its checkpoint and best heads exist beside those that they replace.
        """
        kept, temporary = 0, 0
        for trial in trials:
            missing = sum(not self.find(trial, seed)[1] for seed in range(self.seeds))
            if missing:
                with torch.device("meta"):
                    heads = sum(4 * each.numel() for each in trial.plan.architecture.build().parameters())
                states = 2 if trial.plan.settings.optimizer == "adamw" else 1
                kept += missing * heads
                temporary = max(temporary, (2 * (1 + states) + 1) * heads)
        if not kept:
            return
        there = next(each for each in (self.folder.absolute(), *self.folder.absolute().parents) if each.exists())
        need, free = kept + temporary, shutil.disk_usage(there).free
        if need > free:
            raise UserError(
                f"The disk of {self.folder} has too little space: the runs need up to {format_bytes(need)}, "
                f"{format_bytes(free)} are free. Free some space, pass another --out, or use fewer --seeds."
            )
        typer.echo(
            f"The runs under {self.folder} need up to {format_bytes(need)}, of which {format_bytes(kept)} are kept."
        )


def held_out_by_all(trials: Sequence[Trial]) -> list[Rows]:
    """Return the rows of each store that all trials hold out, so that none of them was trained on.

    Raises:
        UserError: There are no such rows.
    """
    masks = [np.logical_and.reduce(rows) for rows in zip(*(each.plan.held_out for each in trials), strict=True)]
    if not any(rows.any() for rows in masks):
        raise UserError("These fits have no held-out pairs in common, so there is nothing to score. Raise --held-out.")
    return masks
