"""Score a run on evaluation sets, one after the other. An error in one set need not stop the next."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import RunFolder
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.models import Encoders, RunError
from sail_align.evaluate.results.scores import Record
from sail_align.evaluate.results.writer import ScoreWriter
from sail_align.evaluate.tasks.task import TooSmallError, all_tasks, find_task
from sail_align.extract.data import UnreadableImageError
from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.manifest import Manifest
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.progress import note


def evaluate_sets(
    run: Run,
    sets: Iterable[tuple[Manifest, Path]],
    *,
    features: Path = Path("features"),
    device: str = "cpu",
    allow_remote_code: Sequence[str] = (),
    quiet: bool = False,
    stop_at_fault: bool = False,
) -> Iterator[Record]:
    """Score each manifest under its data root. Yield its record after writing it into the run.

    A set that is too small for its task is skipped with a note. A run with a correction is also scored by the task's
    corrected protocol, if it has one.

    Args:
        run: The run, or one of its checkpoints. Its scores and examples are updated after each set.
        sets: Evaluation manifests, each with the data root of its files.
        features: Folder of stores. Those of the evaluation sets are in its `eval/`.
        device: Device of encoders and heads.
        allow_remote_code: Repositories of encoders that may run their own code, each as `owner/name@commit`.
        quiet: Show no progress bars.
        stop_at_fault: Raise an error of a set. Otherwise it is the set's record.

    Raises:
        UserError: A set cannot be scored, and `stop_at_fault` is set.
        WorkersFailedError: A set cannot be encoded, and `stop_at_fault` is set.
        RunError: The run's encoders cannot be loaded, or its heads have diverged.
    """
    encoders = Encoders(run, device, allow_remote_code)
    folder = RunFolder(run.path).scores
    with report_write_errors(folder, has_out=False):
        writer = ScoreWriter(run)
    for manifest, root in sets:
        for about in _protocols(manifest, run):
            started = time.monotonic()
            try:
                with report_write_errors(features, during_run=True, has_out=False):
                    features.mkdir(parents=True, exist_ok=True)  # else a missing file of the set could be taken for it
                    data = EvaluationSet(about, root, encoders, features / "eval", quiet)
                    task = find_task(data.task.kind)
                    result = task.score(data)
            except RunError:
                raise
            except (UserError, WorkersFailedError, UnreadableImageError, OSError) as problem:
                reason = " ".join(str(problem).split())
                if stop_at_fault and isinstance(problem, WorkersFailedError):
                    raise
                if stop_at_fault:
                    raise UserError(reason) from problem
                if isinstance(problem, TooSmallError):
                    note(f"skipped: {problem}")
                else:
                    with report_write_errors(folder, has_out=False):
                        record = writer.add_error(about, reason)
                    yield record
                break
            else:
                with report_write_errors(folder, has_out=False):
                    record = writer.add(data, task.protocol_id(data), result)
                if not quiet:
                    seconds = time.monotonic() - started
                    note(f"{record.name}: {seconds:.1f} s, of which {data.encoding_seconds:.1f} s for encoding.")
                yield record


def _protocols(manifest: Manifest, run: Run) -> list[Manifest]:
    """Return a manifest under each protocol to score; if the first of them fails, so do the others."""
    task = all_tasks().get(manifest.task.kind) if manifest.task else None
    return task.protocols(manifest, run) if task else [manifest]
