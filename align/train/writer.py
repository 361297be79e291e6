"""Log, checkpoint and progress writer of a training run, with collapse detection."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.optim import Optimizer

from sail_align.align.data.loader import Source
from sail_align.align.data.sampler import StreamState
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.runs.checkpoint import Checkpoint, Tensors
from sail_align.align.runs.folder import RunFolder, quality
from sail_align.align.settings import OnCollapse
from sail_align.align.train.bank import BankBuilder
from sail_align.align.train.collapse import Watch
from sail_align.align.train.cost import format_seconds
from sail_align.align.train.plan import Plan
from sail_align.align.train.trackers import TRACKERS
from sail_align.extract.errors import UserError
from sail_align.extract.system.progress import note, progress

SAVE_SECONDS = 60.0
"""Time between saves: saving large heads takes longer than a small step."""

RATED_STEPS = 10
"""Steps after the first, which compiles and waits for the disk, whose rate is printed if a run takes some time."""

SOME_SECONDS = 30.0

WINDOW_SECONDS = 2.0
"""Shortest time over which rates are measured."""


def remove_outdated(run: RunFolder, best: Path, keep: int, *, finished: bool) -> None:
    """Remove all checkpoints but the last `keep` and the best, and of a finished run all states of the optimiser."""
    folders = run.checkpoints()
    outdated = [folder for folder in run.checkpoints("best") if folder != best]
    for folder in (*outdated, *folders[:-keep]):
        RunFolder(folder).discard()
    if finished:  # nothing resumes from these
        for folder in folders[-keep:]:
            (folder / "optimizer.safetensors").unlink(missing_ok=True)


def close_finished(run: Path, saved: Checkpoint, keep: int) -> None:
    """Check a finished run, and end a clean-up during which its process was killed.

    Args:
        run: Folder of the run.
        saved: Its last checkpoint.
        keep: Number of checkpoints to keep, if the clean-up was not finished.

    Raises:
        UserError: Its weights or its log are damaged.
    """
    saved.check_finished(run)
    folder = RunFolder(run)
    folder.discard_after(saved.step)
    if folder.finished:
        return
    best = Checkpoint.best(run)
    if any((each / "optimizer.safetensors").exists() for each in folder.checkpoints()):
        remove_outdated(folder, best.folder if best else run, keep, finished=True)
    folder.finish(saved.step)


class RunWriter:
    """Writes the log, checkpoints, trackers and progress of a run, in one process, and watches for a collapse.

    The best weights on held-out pairs are kept in memory until the next save, so that frequent scoring does not slow a
    small run. If the process is killed before, the resumed run finds them again.

    Attributes:
        collapse: Message that ends the run, once a collapse is seen that should stop it.
        out_of_patience: Whether as many scorings as the settings allow have passed since the best one.
        close: Close the log, the trackers and the progress bar.
    """

    def __init__(
        self,
        plan: Plan,
        run: Path,
        stream: Source,
        device: torch.device,
        *,
        bank: BankBuilder,
        confirm: Callable[[], None],
        done: int | None,
        keep: int,
        save_seconds: float = SAVE_SECONDS,
        on_collapse: OnCollapse = "stop",
        track: Sequence[str] = (),
        quiet: bool = False,
    ):
        """Open a run for writing.

        Checkpoints and log lines after the step to resume from are removed: training will write them again.

        Args:
            plan: Plan of the run.
            run: Its folder.
            stream: Source of the training batches, for progress.
            device: Device of the model, for progress.
            bank: Completes the weights that are kept for use.
            confirm: Function of `hold_run`, called before each save.
            done: Steps done before; None for a new run.
            keep: Number of resumable checkpoints to keep.
            save_seconds: Time between saves.
            on_collapse: Whether a collapse stops the run.
            track: Names of trackers.
            quiet: Whether to show no progress bar.

        Raises:
            UserError: The run has collapsed before, its log is damaged, or a tracker cannot be used.
        """
        self._run, self._about, self._settings = RunFolder(run), plan.checkpoint_record(), plan.settings
        self._confirm, self._keep, self._save_seconds, self._on_collapse = confirm, keep, save_seconds, on_collapse
        self._stream, self._device, self._bank = stream, device, bank
        self._watch, self._warned = Watch(plan.settings.lr), False
        self.collapse: str | None = None
        self._highest, self._scorings_since = -math.inf, 0
        last = self._run.last
        self._run.discard_after(RunFolder(last).step if last else -1)
        best = Checkpoint.best(run)
        self._best, self._best_folder = (quality(best.scores), best.folder) if best else (None, run)
        self._unsaved_best: tuple[Tensors, int, Mapping[str, float]] | None = None
        self._scored: tuple[int, Mapping[str, float]] = (-1, {})
        with ExitStack() as opened:
            saved = None if done is None else Checkpoint.read(run)
            self._log, entries = self._run.open_log(done, saved.record.get("log_sha256") if saved else None)
            opened.callback(self._log.close)
            for entry in entries:
                self._see(**entry)
            if self.collapse:
                raise UserError(self.collapse)
            self._trackers = [TRACKERS[name](run, plan.record(), done) for name in track]
            for tracker in self._trackers:
                opened.callback(tracker.close)
            hidden = quiet or plan.settings.steps == 0
            self._bar = progress(plan.settings.steps, "fit", unit="step", done=done or 0, quiet=hidden)
            opened.enter_context(self._bar)
            self.close = opened.pop_all().close
        self._steps, self._done, self._hidden = 0, done or 0, hidden
        self._saved, self._pace, self._measured = time.monotonic(), "", self._counters()

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Log a training step."""
        self._write("train", step, values)
        self._measure_pace()
        self._estimate_time()
        _, scores = self._scored
        r1 = f"R@1 {scores['r1']:.1f}" if scores else ""
        words = (f"loss {values['loss']:.4g}", r1, self._pace)
        self._bar.set_postfix_str(", ".join(word for word in words if word), refresh=False)
        self._bar.update()

    def log_scores(self, step: int, scores: Mapping[str, float], model: AlignmentModel) -> None:
        """Log scores on held-out pairs, and keep the weights if they are the best."""
        self._write("heldout", step, scores)
        self._scored = step, dict(scores)
        found = quality(scores)
        if found is not None and (self._best is None or found > self._best):
            self._best, self._best_folder = found, self._run.checkpoint(step, "best")
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            self._unsaved_best = weights, step, dict(scores)

    @property
    def out_of_patience(self) -> bool:  # noqa: D102 (an attribute of the class)
        return self._settings.patience is not None and self._scorings_since >= self._settings.patience

    @property
    def save_is_due(self) -> bool:
        """Whether it is time for a save."""
        return time.monotonic() - self._saved >= self._save_seconds

    def save(
        self, step: int, stream: StreamState, model: AlignmentModel, optimizer: Optimizer | None
    ) -> dict[str, float]:
        """Save the state after a step, or, without an optimiser, the result of the finished run.

        Then remove checkpoints that need not be kept. Return the last scores; a finished run has corrected ones, too.

        Raises:
            UserError: Another process has taken over the run.
        """
        self._confirm()
        os.fsync(self._log.fileno())  # the checkpoint relies on these lines, also after a power cut
        finished = optimizer is None
        if self._unsaved_best:
            weights, best_step, scores = self._unsaved_best
            if not (finished and best_step == step):  # else the last checkpoint is the best one
                weights, architecture, corrected = self._bank.complete(weights)
                about, scores = {**self._about, "architecture": architecture}, {**scores, **corrected}
                Checkpoint.write(self._best_folder, weights, about, step=best_step, finished=False, scores=scores)
        self._unsaved_best = None
        scored, scores = self._scored
        weights, about = model.state_dict(), {**self._about, "stream": stream, "log_sha256": self._run.metrics_digest()}
        if finished:
            weights, about["architecture"], corrected = self._bank.complete(weights)
            scores = {**scores, **corrected}
        Checkpoint.write(
            self._run.checkpoint(step),
            weights,
            about,
            step=step,
            finished=finished,
            scores=scores if scored == step else None,
            optimizer=None if optimizer is None else Checkpoint.optimizer_state(model, optimizer),
        )
        remove_outdated(self._run, self._best_folder, self._keep, finished=finished)
        if finished:
            self._run.finish(step)
        self._saved = time.monotonic()
        return dict(scores)

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._log.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._log.flush()
        for tracker in self._trackers:
            tracker.log(kind, step, values)
        self._see(kind, step, **values)

    def _see(self, kind: str, step: int, **values: float) -> None:
        if kind == "heldout" and (found := quality(values)) is not None:
            self._scorings_since = 0 if found > self._highest else self._scorings_since + 1
            self._highest = max(self._highest, found)
        seen = self._watch.see(kind, step, values)
        if seen and self._on_collapse == "stop":
            self.collapse = self.collapse or seen
        elif seen and not self._warned:
            self._warned = True
            note(f"warning: {seen}")

    def _measure_pace(self) -> None:
        """Count a step, and from time to time measure rates, waiting time and peak memory since the last time."""
        self._steps += 1
        now = self._counters()
        seconds, steps, read, waited = (new - old for new, old in zip(now, self._measured, strict=True))
        if seconds >= WINDOW_SECONDS:
            self._measured = now
            self._pace = (
                f"{steps * self._settings.batch_size / seconds:,.0f} pairs/s, {read / seconds / 1e9:.2g} GB/s read, "
                f"{waited / seconds:.0%} waiting for data, {self._peak_bytes() / 1e9:.1f} GB"
            )

    def _estimate_time(self) -> None:
        """Print how long the run will take at the rate of its first steps."""
        if self._steps == 1:
            self._rated = time.monotonic()
        elif self._steps == 1 + RATED_STEPS and not self._hidden:
            seconds = (time.monotonic() - self._rated) / RATED_STEPS
            total = seconds * (self._settings.steps - self._done)
            if total >= SOME_SECONDS:
                note(f"At the rate of the first ten steps ({seconds:.2g} s each): {format_seconds(total)}")

    def _counters(self) -> tuple[float, float, float, float]:
        return time.monotonic(), self._steps, self._stream.bytes_read, self._stream.wait_seconds

    def _peak_bytes(self) -> int:
        """Return the peak memory of the GPU, or of this process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10  # kilobytes on Linux
