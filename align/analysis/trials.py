"""Fits that are compared with each other: one recipe but for what is compared, scored on the same held-out rows."""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sail_align.align.data.pairs import Half, Pairs, Rows, read_rows
from sail_align.align.runs.checkpoint import Run, checkpoint_folders, discard, load_run, read_checkpoint
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import decisive, is_run
from sail_align.align.settings import COMPARED_HELD_OUT, PAPER_ROWS
from sail_align.align.stats.metrics import ranks
from sail_align.align.train.plan import Plan
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import canonical_json

FORMAT = 1
WARMUP = 0.1
"""Of the steps, as in the script that the paper's authors released: a sudden start can collapse the sigmoid loss."""
SMALL = {"lr": 3e-4, "batch_size": 256, "epochs": 20}
"""From a random start on thousands of pairs, where the paper's rate leaves a head untrained."""
BLOCK = 1_024

Hits = NDArray[np.bool_]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One recipe by its name, and its plan with the first seed."""

    name: str
    plan: Plan

    def seeded(self, seed: int) -> Plan:
        """Return the plan with another seed."""
        return replace(self.plan, settings=replace(self.plan.settings, seed=seed))


@dataclass(frozen=True)
class Retrieved:
    """Which of the held-out captions find their image first, and which images their caption, (N,) each."""

    text_to_image: Hits
    image_to_text: Hits

    @property
    def t2i_r1(self) -> float:
        """Recall@1 text → image in percent."""
        return 100 * float(self.text_to_image.mean())

    @property
    def i2t_r1(self) -> float:
        """Recall@1 image → text in percent."""
        return 100 * float(self.image_to_text.mean())


def base_recipe(stores: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a fit from a random start: the paper's, `SMALL` on stores of few rows, and what was given.

    Raises:
        UserError: A path is no store.
    """
    few = sum(Store.open(path).rows for path in stores) < PAPER_ROWS
    shared = {"preset": "paper", "held_out": COMPARED_HELD_OUT, "warmup": WARMUP}
    recipe: dict[str, Any] = {**shared, **(SMALL if few else {})}
    if "steps" in given:
        recipe.pop("epochs", None)
    return recipe | dict(given)


def finished_run(plan: Plan, folder: Path, name: str, *, device: torch.device, quiet: bool) -> tuple[Run, bool]:
    """Return a plan's finished run under a folder, and whether it was there already; one that was begun goes on.

    Of a run's checkpoints only the last is kept, which is what is scored.
    """
    path, there = _look_up(plan, folder, name)
    if not there:
        fit(plan, claim_run(path, plan.record()).path, device=device, quiet=quiet, keep=1, on_collapse="warn")
        for best in checkpoint_folders(path, "best"):
            discard(best)
    return load_run(path), there


def require_room(trials: Sequence[Trial], folder: Path, seeds: int, say: Say) -> None:
    """Say how much of the disk the runs under a folder take that are still to be trained.

    Each leaves its heads. While it is trained, its checkpoint and its best heads lie beside the ones that they replace.

    Raises:
        UserError: The disk has not so much left.
    """
    lasting, passing = 0, 0
    for trial in trials:
        with torch.device("meta"):
            heads = sum(4 * each.numel() for each in trial.plan.architecture.build().parameters())
        left = sum(not _look_up(trial.seeded(seed), folder, trial.name)[1] for seed in range(seeds))
        states = 2 if trial.plan.settings.optimizer == "adamw" else 1
        lasting += left * heads
        passing = max(passing, (2 * (1 + states) + 1) * heads) if left else passing
    if not lasting:
        return
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    need, free = lasting + passing, shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"The runs under {folder} take up to {_gigabytes(need)} and the disk has {_gigabytes(free)} left; free "
            "some, name another --out, or give fewer --seeds."
        )
    say(f"The runs under {folder} take up to {_gigabytes(need)}, of which {_gigabytes(lasting)} stay.")


def _gigabytes(size: int) -> str:
    """Write a number of bytes for people."""
    return f"{size / 1e9:.3g} GB"


def _look_up(plan: Plan, folder: Path, name: str) -> tuple[Path, bool]:
    """Return where a plan's run is, and whether it is there and finished.

    Its name ends with a digest of all that decides its weights: with other options it is another run.
    """
    digest = hashlib.sha256(canonical_json(decisive(plan.record()))).hexdigest()[:8]
    words = re.sub(r"\W+", "-", name.replace("×", "x")).strip("-")
    path = folder / f"{words}-seed{plan.settings.seed}-{digest}"
    return path, is_run(path) and (saved := read_checkpoint(path)) is not None and bool(saved.record["finished"])


def held_out_by_all(trials: Sequence[Trial]) -> list[Rows]:
    """Return the rows of each store that every trial keeps out: none of them has trained on any.

    Raises:
        UserError: There is none.
    """
    masks = [np.logical_and.reduce(rows) for rows in zip(*(each.plan.held_out for each in trials), strict=True)]
    if not any(rows.any() for rows in masks):
        raise UserError("No pairs are held out by all of these fits, so there is nothing to score; raise --held-out.")
    return masks


def read_scored(pairs: Sequence[Pairs], rows: Sequence[Rows]) -> tuple[Half, Half]:
    """Return the images (N, D_I), and the texts (N, D_T) of the first caption, of the rows to score on."""
    images, texts = read_rows([each.only(each.captions[:1]) for each in pairs], rows)
    return images, texts[0]


@torch.no_grad()
def retrieve(run: Run, image_ND: Half, text_ND: Half, device: torch.device) -> Retrieved:
    """Embed pairs with a run's heads and look each up among all the others."""
    model = run.model.to(device)

    def embedded(encode: Callable[[torch.Tensor], torch.Tensor], features_ND: Half) -> NDArray[np.float32]:
        starts = range(0, len(features_ND), BLOCK)
        blocks = (torch.from_numpy(features_ND[start : start + BLOCK]) for start in starts)
        return np.concatenate([encode(block.to(device)).cpu().numpy() for block in blocks])

    image_NE, text_NE = embedded(model.encode_image, image_ND), embedded(model.encode_text, text_ND)
    image_ranks, text_ranks = ranks(image_NE, text_NE, np.arange(len(image_NE)))
    return Retrieved(text_ranks == 0, image_ranks == 0)


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation over the seeds; the value alone for one seed."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
