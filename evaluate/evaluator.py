"""Score a run on evaluation sets, one after the other; one set's fault need not stop the next."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from sail_align.align.runs.checkpoint import Run
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.models import Encoders, RunError
from sail_align.evaluate.results.scores import (
    Record,
    error_record,
    examples_path,
    merge_score,
    open_scores,
    save_outcomes,
    score_record,
)
from sail_align.evaluate.tasks import PROTOCOLS
from sail_align.evaluate.tasks.base import TooSmallError
from sail_align.extract.data import UnreadableImageError
from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.manifest import Manifest
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.progress import note


def evaluate_sets(
    run: Run,
    sets: Iterable[tuple[Manifest, Path]],
    *,
    features: Path = Path("features"),
    device: str = "cpu",
    quiet: bool = False,
    stop_at_fault: bool = False,
) -> Iterator[Record]:
    """Score each manifest under its data root; yield its record after writing it into the run.

    A set that is too small for its task is left out with a word on it, and is no fault.

    Args:
        run: The run, or one of its checkpoints; its scores and examples are updated after each set.
        sets: Evaluation manifests, each with the data root its files lie under.
        features: Folder of stores; the evaluation sets' go into its `eval/`.
        device: Where encoders and heads compute.
        quiet: No progress bars.
        stop_at_fault: Raise a set's fault, where it would else be the set's record.

    Raises:
        UserError: A set cannot be scored, and `stop_at_fault`.
        WorkersFailedError: A set cannot be encoded, and `stop_at_fault`.
        RunError: The run's encoders cannot be loaded, or its heads have diverged.
    """
    encoders = Encoders(run, device)
    open_scores(run)
    for manifest, root in sets:
        started = time.monotonic()
        try:
            data = EvaluationSet(manifest, root, encoders, features / "eval", quiet)
            protocol = PROTOCOLS[data.task.kind]
            result = protocol.evaluate(data)
        except RunError:
            raise
        except (UserError, WorkersFailedError, UnreadableImageError, OSError) as problem:
            if stop_at_fault and isinstance(problem, WorkersFailedError):
                raise
            if stop_at_fault:
                raise UserError(" ".join(str(problem).split())) from problem
            if isinstance(problem, TooSmallError):
                note(f"left out: {problem}")
                continue
            record = error_record(manifest, problem)
        else:
            record = score_record(data, protocol.id(data), result, time.monotonic() - started)
            examples = [example.to_json() for example in result.examples]
            write_atomically(examples_path(run.path, record), json.dumps(examples).encode())
            save_outcomes(run.path, record, result.outcomes)
        merge_score(run, record)
        yield record
