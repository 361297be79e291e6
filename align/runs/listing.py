"""The runs in a folder, with their progress and scores, read without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sail_align.align.runs.folder import (
    BEGIN_AGAIN,
    RunFolder,
    content_digest,
    damaged,
    quality,
    read_json,
    record_digest,
)
from sail_align.align.stats.tables import format_table, number, one_line
from sail_align.extract.errors import UserError
from sail_align.extract.system.leases import Leases

HEADER = ("run", "state", "steps", "head", "stores", "held-out R@1", "scores")
SHOWN = 3
"""Scores shown of a run."""
EVALUATE_AGAIN = "Remove it and evaluate again."


@dataclass
class RunSummary:
    """A run's progress and scores.

    Attributes:
        path: Folder of the run.
        saved: Time of its last checkpoint, or of its settings if there is none, in nanoseconds since 1970.
        state: `finished`, `resumable`, `running`, `running elsewhere` (on another machine, unless that has crashed),
            `model` (of OpenCLIP, to compare with) or `damaged`.
        step: Steps done in the last checkpoint.
        steps: Steps in total. 0 for heads without training.
        head: Kind of the heads.
        stores: Paths of its stores.
        held_out: Scores of the run's weights on held-out pairs, as their checkpoint records them.
        best_step: Step of these weights, the best ones, if they are not the last.
        scores: The sets that `sail-eval` has scored: dataset, task, protocol, metrics, and `checkpoint`, the name of
            the scored checkpoint, None for the run's weights.
        outdated: Whether the run has other weights since it was scored.
        problem: What is damaged. Empty if nothing is.
    """

    path: Path
    saved: int = 0
    state: str = "damaged"
    step: int = 0
    steps: int = 0
    head: str = ""
    stores: list[str] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    outdated: bool = False
    problem: str = ""

    @classmethod
    def read(cls, path: Path) -> "RunSummary":
        """Read the summary of a run. What is damaged is described in it."""
        found = cls(path)
        try:
            found.saved = (path / "settings.json").stat().st_mtime_ns
            found._read_settings(RunFolder(path).settings())
            digest = found._read_checkpoint()
            found._read_scores(digest)
        except (UserError, OSError) as problem:
            found.state, found.problem = "damaged", " ".join(str(problem).split())
        return found

    def _read_settings(self, settings: Mapping[str, Any]) -> None:
        stores = settings.get("stores")
        self.stores = [str(each) for each in stores] if isinstance(stores, list) else []
        self.head = str(settings.get("head") or settings.get("model") or "")
        self.steps = steps if isinstance(steps := settings.get("steps"), int) else 0
        self.state = "model" if "model" in settings else "resumable"

    def _read_checkpoint(self) -> str | None:
        """Read the checkpoints and the lock; return the digest of the run's weights, None if there are none."""
        folder = RunFolder(self.path)
        digest: str | None = None
        if (last := folder.last) is not None:
            record, self.saved = _read_record(last), (last / "model.json").stat().st_mtime_ns
            self.step, chosen = RunFolder(last).step, record
            for best in folder.checkpoints("best"):
                other = _read_record(best)
                if (quality(other.get("scores")) or 0) >= (quality(chosen.get("scores")) or 0):
                    chosen = other
                    self.best_step = step if (step := RunFolder(best).step) != self.step else None
            digest, scores = str(chosen["digest"]), chosen.get("scores")
            self.held_out = dict(scores) if isinstance(scores, dict) else {}
            if record.get("finished"):
                self.state = "finished"
                return digest
        alive = Leases(self.path / "lease").is_held("fit")
        if alive is not False:
            self.state = "running" if alive else "running elsewhere"
        return digest

    def _read_scores(self, digest: str | None) -> None:
        for file in (self.path / "scores.json", *sorted((self.path / "scores").glob("*/scores.json"))):
            if not file.is_file():
                continue
            content = read_json(file, EVALUATE_AGAIN)
            run, records = content.get("run"), content.get("records")
            if content.get("digest", "") not in ("", content_digest(content)) or not (
                isinstance(run, dict) and isinstance(records, list) and all(isinstance(each, dict) for each in records)
            ):
                raise damaged(file, EVALUATE_AGAIN)
            name = None if file.parent == self.path else file.parent.name
            self.outdated |= name is None and digest is not None and run.get("digest") != digest
            fields = ("dataset", "task", "protocol", "metrics")
            self.scores += [
                {**{each: record.get(each) for each in fields}, "checkpoint": name}
                for record in records
                if isinstance(record.get("metrics"), list) and record["metrics"]
            ]

    def row(self) -> tuple[str, ...]:
        """Return the cells of `HEADER`."""
        recall = f"{number(self.held_out['r1'])}" if isinstance(self.held_out.get("r1"), int | float) else ""
        best = f" (best: step {self.best_step:,})" if self.best_step is not None else ""
        steps = f"{self.step:,} / {self.steps:,}" if self.steps else ""
        stores = ", ".join(Path(each).stem for each in self.stores)
        return str(self.path), self.state, steps, self.head, stores, recall + best, self._describe_scores()

    def _describe_scores(self) -> str:
        texts = []
        for score in self.scores:
            metric = score["metrics"][0]
            if (
                score["checkpoint"] is None
                and isinstance(metric, dict)
                and isinstance(metric.get("value"), int | float)
            ):
                texts.append(f"{score['dataset']} {number(metric['value'])}")
        more = f", {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
        return ", ".join(texts[:SHOWN]) + more + (" (of earlier weights)" if self.outdated and texts else "")

    def to_dict(self) -> dict[str, Any]:
        """Return all facts, ready for JSON."""
        saved = datetime.fromtimestamp(self.saved / 1e9, UTC).isoformat(timespec="seconds")
        return {**asdict(self), "path": str(self.path), "saved": saved}


def _read_record(checkpoint: Path) -> dict[str, Any]:
    """Return the content of model.json. Raises `UserError` if it is damaged."""
    record = read_json(file := checkpoint / "model.json", BEGIN_AGAIN)
    if record.get("digest") != record_digest(record):
        raise damaged(file, BEGIN_AGAIN)
    return record


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder, or the run that the folder is, newest first.

    Raises:
        UserError: The folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Name one with runs, or train a run with `sail-align fit`.")
    paths = [folder] if RunFolder(folder).is_run else [path for path in folder.iterdir() if RunFolder(path).is_run]
    return sorted(map(RunSummary.read, paths), key=lambda run: (-run.saved, str(run.path)))


def runs_table(runs: list[RunSummary]) -> str:
    """Return a table with a line per run, and a line below it for each damaged one."""
    problems = [one_line(f"{run.path} is damaged: {run.problem}") for run in runs if run.problem]
    return "\n".join([format_table(HEADER, [run.row() for run in runs], "llrll", style="simple"), *problems])
