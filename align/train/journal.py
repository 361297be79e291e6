"""All that a training run writes and says: its log, checkpoints and progress, and whether it has collapsed."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from sail_align.align.data.loader import Stream
from sail_align.align.data.sampler import StreamState
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.runs.checkpoint import Saver
from sail_align.align.runs.folder import BEGIN_AGAIN, damaged, read_file
from sail_align.align.train.collapse import Watch
from sail_align.align.train.plan import Plan
from sail_align.align.train.trackers import open_trackers
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.progress import note, progress

WINDOW_SECONDS = 2.0
"""Rates are over at least so much time."""


class Pace:
    """Pairs and bytes a second, the share of the time that data were waited for, and memory at its highest."""

    def __init__(self, stream: Stream, batch_size: int, device: torch.device):
        self._stream, self._batch_size, self._device = stream, batch_size, device
        self._steps = 0
        self._before = self._now()
        self._said = ""

    def stepped(self) -> str:
        """Count a step; return what is known of the pace, in words, "" at first."""
        self._steps += 1
        now = self._now()
        seconds, steps, read, waited = (new - old for new, old in zip(now, self._before, strict=True))
        if seconds >= WINDOW_SECONDS:
            self._before = now
            self._said = (
                f"{steps * self._batch_size / seconds:,.0f} pairs/s, {read / seconds / 1e9:.2g} GB/s read, "
                f"{waited / seconds:.0%} waiting for data, {self._peak_bytes() / 1e9:.1f} GB"
            )
        return self._said

    def _now(self) -> tuple[float, float, float, float]:
        return time.monotonic(), self._steps, self._stream.bytes_read, self._stream.wait_seconds

    def _peak_bytes(self) -> int:
        """Return the most memory that was held so far: of the GPU, or of this process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10  # kilobytes on Linux


OnCollapse = Literal["stop", "warn"]


class Journal:
    """Of the processes that train a run, one keeps its journal.

    `collapse` is the sentence that ends the run, once the watch has seen a collapse that is to stop it; a run that is
    only to be warned of it says it once.
    """

    def __init__(
        self,
        plan: Plan,
        run: Path,
        stream: Stream,
        device: torch.device,
        *,
        confirm: Callable[[], None],
        done: int | None,
        keep: int,
        save_seconds: float,
        on_collapse: OnCollapse,
        track: Sequence[str] = (),
        quiet: bool = False,
    ):
        """Go on behind step `done`, or begin (None); `confirm` is `hold_run`'s.

        Raises:
            UserError: The run had collapsed already, or a tracker cannot be used.
        """
        settings = plan.settings
        self._settings, self._on_collapse, self._warned = settings, on_collapse, False
        self._confirm = confirm
        self._saver = Saver(run, plan.checkpoint_record(), keep=keep, seconds=save_seconds)
        self._watch = Watch(settings.lr)
        self._pace = Pace(stream, settings.batch_size, device)
        self._r1 = ""
        self.collapse: str | None = None
        self._open = ExitStack()
        with ExitStack() as opened:
            self._log = opened.enter_context(MetricsLog(run, done))
            for entry in self._log.kept:
                self._see(**entry)
            if self.collapse:
                raise UserError(self.collapse)
            self._trackers = open_trackers(track, run, plan.record(), done)
            for tracker in self._trackers:
                opened.callback(tracker.close)
            silent = quiet or settings.steps == 0
            self._bar = progress(settings.steps, "fit", unit="step", done=done or 0, quiet=silent)
            opened.enter_context(self._bar)
            self._open = opened.pop_all()

    def trained(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step."""
        self._write("train", step, values)
        words = (f"loss {values['loss']:.4g}", self._r1, self._pace.stepped())
        self._bar.set_postfix_str(", ".join(word for word in words if word), refresh=False)
        self._bar.update()

    def scored(self, step: int, model: AlignmentModel, scores: Mapping[str, float]) -> None:
        """Log a scoring, and keep the weights if they are the best."""
        self._r1 = f"R@1 {scores['r1']:.1f}"
        self._write("heldout", step, scores)
        self._saver.scored(model, step, scores)

    @property
    def save_is_due(self) -> bool:
        """Whether it is time to save."""
        return self._saver.is_due

    def save(self, model: AlignmentModel, step: int, stream: StreamState, optimizer: Optimizer | None) -> None:
        """Save a step's state, or with no optimiser that of a finished run."""
        self._confirm()
        self._log.sync()
        self._saver.save(model, step, stream, optimizer)

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._log.write(kind, step, **values)
        for tracker in self._trackers:
            tracker.log(kind, step, values)
        self._see(kind, step, **values)

    def _see(self, kind: str, step: int, **values: float) -> None:
        seen = self._watch.see(kind, step, values)
        if seen and self._on_collapse == "stop":
            self.collapse = self.collapse or seen
        elif seen and not self._warned:
            self._warned = True
            note(f"warning: {seen}")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line with its `kind` and `step`. Opened at a step, it drops what came later.

    It holds no times and no paths: a run that was stopped and resumed writes the same bytes as one that was not.
    `kept` are the entries that were there.
    """

    def __init__(self, run: Path, step: int | None):
        """Open the log of a run that goes on behind `step`, or of one that begins (None).

        Raises:
            UserError: The log does not reach that step, or is damaged before it.
        """
        path = run / "metrics.jsonl"
        self.kept: list[dict[str, Any]] = []
        lines = []
        if step is not None:
            try:
                for line in read_file(path, BEGIN_AGAIN).decode().splitlines(keepends=True):
                    if not line.endswith("\n") or (entry := json.loads(line))["step"] > step:
                        break
                    lines.append(line)
                    self.kept.append(entry)
            except (ValueError, KeyError, TypeError) as problem:
                raise damaged(path, BEGIN_AGAIN) from problem
            if sum(entry["kind"] == "train" for entry in self.kept) != step:
                raise damaged(path, BEGIN_AGAIN)
        write_atomically(path, "".join(lines).encode())
        self._file = path.open("a")

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one line; it is in the file when this returns."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the lines on the disk before a checkpoint that counts on them: a power cut would lose them alone."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
