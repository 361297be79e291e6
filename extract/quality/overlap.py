"""Near-duplicates between two stores: images of one that are almost the same as an image of the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.store.joined import StoredFeatures
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors, write_atomically
from sail_align.extract.system.progress import progress

SHOWN = 20
"""Pairs shown as text."""
TRAIN_ROWS = 2_048
EVAL_ROWS = 32_768


@dataclass(frozen=True)
class Overlap:
    """The most similar row of the evaluation store for every row of the training store.

    Attributes:
        train: The training store.
        evaluation: The evaluation store.
        cosines: Cosine of the image features, (N,); −1 if the training row has no image.
        matches: Row in the evaluation store, (N,).
    """

    train: Store
    evaluation: Store
    cosines: NDArray[np.float32]
    matches: NDArray[np.int64]

    @classmethod
    def between(
        cls, train: Store, evaluation: Store, *, encoder: str | None = None, device: str = "cpu", quiet: bool = False
    ) -> "Overlap":
        """Compare every image of a training store with every image of an evaluation store, by their features' cosine.

        The features' mean is not subtracted: without it they separate worse (docs/store.md). A block of each store is
        in memory with the cosines between them, half a gigabyte for 2,048 dimensions. The training store is read once
        for every 32,768 rows of the evaluation store.

        Raises:
            UserError: A store has no such image features or is incomplete, the encoders differ, or the two stores are
                the same.
        """
        ours, theirs = train.image(encoder), evaluation.image(encoder)
        theirs.identity.check_matches(ours.identity, where=str(train.path))
        for store, array in ((train, ours), (evaluation, theirs)):
            if not array.complete:
                raise UserError(f"The images of {store.path} are incomplete. Finish them with `sail-extract run`.")
        if train.digest == evaluation.digest:
            raise UserError(f"{evaluation.path} has the same content as {train.path}. Pass two different stores.")
        cosine_N = np.full(train.rows, -1, dtype=np.float32)
        match_N = np.zeros(train.rows, dtype=np.int64)
        work = ours.counts.get(Status.OK.label, 0) * -(-evaluation.rows // EVAL_ROWS)
        with progress(work, f"{train.dataset} against {evaluation.dataset}", quiet=quiet) as bar:
            for eval_rows, eval_MD in _unit_features(theirs, EVAL_ROWS, device):
                for rows, train_BD in _unit_features(ours, TRAIN_ROWS, device):
                    best_B, place_B = (each.cpu().numpy() for each in (train_BD @ eval_MD.T).max(dim=1))
                    better = best_B > cosine_N[rows]
                    cosine_N[rows[better]], match_N[rows[better]] = best_B[better], eval_rows[place_B[better]]
                    bar.update(len(rows))
        return cls(train, evaluation, cosine_N, match_N)

    def closest(self, threshold: float) -> NDArray[np.int64]:
        """Return the training rows whose cosine is at least the threshold, highest first."""
        rows = np.flatnonzero(self.cosines >= threshold)
        return rows[np.argsort(-self.cosines[rows], kind="stable")]

    def pairs(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, str, float]]:
        """Yield the key, the key of the most similar evaluation row, and the cosine, for training rows."""
        keys = self.train.index(["key"])["key"].take(rows).to_pylist()
        matches = self.evaluation.index(["key"])["key"].take(self.matches[rows]).to_pylist()
        yield from zip(keys, matches, self.cosines[rows].tolist(), strict=True)

    def describe(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """Yield lines of text: the first `SHOWN` of some pairs, and quantiles of all cosines."""
        for key, match, cosine in self.pairs(rows[:SHOWN]):
            yield f"  {cosine:.4f}  {key}  {match}"
        if len(rows) > SHOWN:
            yield f"  … and {len(rows) - SHOWN:,} more"
        half, most, highest = self._quantiles()
        yield f"best matches: half below {half:.2f}, 99 % below {most:.2f}, highest {highest:.2f}."

    def to_dict(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return what `describe` shows, ready for JSON."""
        quantiles = dict(zip(("half_below", "99_percent_below", "highest"), self._quantiles(), strict=True))
        pairs = [
            {"train": key, "evaluation": match, "cosine": cosine} for key, match, cosine in self.pairs(rows[:SHOWN])
        ]
        return {"near_duplicates": len(rows), "rows": self.train.rows, "best_matches": quantiles, "first": pairs}

    def _quantiles(self) -> tuple[float, ...]:
        valid = self.cosines[self.cosines > -1]
        return tuple(np.quantile(valid, [0.5, 0.99, 1]).tolist()) if len(valid) else (np.nan,) * 3

    def write(self, path: Path, rows: NDArray[np.int64]) -> None:
        """Write a line for each training row: key, key of its match, and cosine, separated by tabs.

        Raises:
            UserError: A key contains a tab or a line break, or the file cannot be written.
        """
        lines = []
        for key, match, cosine in self.pairs(rows):
            if any(character in key + match for character in "\t\n\r"):
                raise UserError(f"Key {key!r} or {match!r} contains a tab or a line break and cannot be listed.")
            lines.append(f"{key}\t{match}\t{cosine:.4f}\n")
        with report_write_errors(path):
            write_atomically(path, "".join(lines).encode())


def _unit_features(array: StoredFeatures, size: int, device: str) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield, for every `size` rows, those that have an image and their unit-norm features, (n, D)."""
    for start in range(0, array.rows, size):
        features, status = array.read(start, min(start + size, array.rows))
        usable = status == Status.OK
        if usable.any():
            block = torch.from_numpy(features[usable]).to(device, torch.float32)
            yield start + np.flatnonzero(usable), torch.nn.functional.normalize(block, dim=1)
