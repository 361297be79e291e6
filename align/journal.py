"""All that a training run writes and says: its log, checkpoints and progress, and whether it has collapsed."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch.optim import Optimizer

from sail_align.align.model import AlignmentModel
from sail_align.align.order import StreamState
from sail_align.align.pace import Pace
from sail_align.align.plan import Plan
from sail_align.align.records import BEGIN_AGAIN, read_file
from sail_align.align.runs import MetricsLog
from sail_align.align.saver import Saver
from sail_align.align.stream import Stream
from sail_align.align.trackers import open_trackers
from sail_align.align.watch import Watch
from sail_align.extract.errors import UserError
from sail_align.extract.progress import note, progress

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


def collapse_of(run: Path, lr: float) -> str | None:
    """Return the sentence that says how a run's training collapsed, if its log shows that it did."""
    watch = Watch(lr)
    for line in read_file(run / "metrics.jsonl", BEGIN_AGAIN).splitlines():
        values = json.loads(line)
        if seen := watch.see(values.pop("kind"), values.pop("step"), values):
            return seen
    return None
