"""When and what a training run saves, and which of its checkpoints it keeps."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from sail_align.align.checkpoint import (
    begun_folders,
    checkpoint_folder,
    checkpoint_folders,
    discard,
    last_checkpoint,
    read_checkpoint,
    save_checkpoint,
    step_of,
    write_checkpoint,
)
from sail_align.align.model import AlignmentModel
from sail_align.align.order import StreamState
from sail_align.align.records import is_whole

SAVE_SECONDS = 60.0
"""A run is saved after the step at which so much time has passed: saving large heads takes longer than small steps."""

KEEP = 2
"""How many checkpoints that training can go on from are kept."""


class Best(NamedTuple):
    """The checkpoint that scored best on held-out pairs, its step, and its mean R@1 in percent."""

    folder: Path
    step: int
    r1: float


class Saver:
    """Saves a run: the last few checkpoints, and the weights that scored best on held-out pairs (mean R@1 both ways).

    The best weights wait in memory for the next save, so that a small run which scores often is not slowed by it. A
    run killed in between goes on from its last checkpoint and finds them again.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], *, keep: int = KEEP, seconds: float = SAVE_SECONDS):
        """Take over a run as it was left; what lies behind its last checkpoint will be made again, and goes."""
        self._run, self._about = run, about
        self._keep, self._seconds = keep, seconds
        self._saved = time.monotonic()
        self._waiting: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._scored: tuple[int, Mapping[str, float]] = (-1, {})
        last = last_checkpoint(run)
        for folder in begun_folders(run):
            if last is None or step_of(folder) > step_of(last) or not is_whole(folder):
                discard(folder)
        self.best = best_of(run) or Best(run, -1, -math.inf)

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self._seconds

    def scored(self, model: AlignmentModel, step: int, scores: Mapping[str, float]) -> None:
        """Be told what the model scores after a step; weights better than all before are kept."""
        self._scored = step, scores
        if scores["r1"] > self.best.r1:
            self.best = Best(checkpoint_folder(self._run, step, "best"), step, scores["r1"])
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            self._waiting = weights, {**self._about, "step": step, "finished": False, "scores": dict(scores)}

    def save(self, model: AlignmentModel, step: int, stream: StreamState, optimizer: Optimizer | None) -> None:
        """Save a step's state, or with no optimiser that of a finished run; then remove what is not to be kept."""
        finished = optimizer is None
        if self._waiting is not None and not (finished and self.best.step == step):
            write_checkpoint(self.best.folder, *self._waiting, None)
        self._waiting = None
        scores = self._scored[1] if self._scored[0] == step else None
        about = {**self._about, "stream": stream}
        save_checkpoint(self._run, model, about, step=step, optimizer=optimizer, scores=scores)
        folders = checkpoint_folders(self._run)
        best = [folder for folder in checkpoint_folders(self._run, "best") if folder != self.best.folder]
        for folder in (*folders[: -self._keep], *best):
            discard(folder)
        if finished:  # nothing goes on from here
            for folder in folders[-self._keep :]:
                (folder / "optimizer.safetensors").unlink(missing_ok=True)
        self._saved = time.monotonic()


def best_of(run: Path) -> Best | None:
    """Return the best of a run's checkpoints, the first of several equals; None where none was scored."""
    scored = []
    for folder in (*checkpoint_folders(run, "best"), *checkpoint_folders(run)):
        saved = read_checkpoint(folder)
        if saved is not None and "r1" in (scores := saved.record.get("scores", {})):
            scored.append(Best(folder, step_of(folder), scores["r1"]))
    return max(scored, key=lambda each: (each.r1, -each.step), default=None)
