"""Writer of a run's `scores.json`, and of the examples and outcomes of each set."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import CONFIG, RunFolder, content_digest, read_file
from sail_align.align.runs.tensors import save_arrays
from sail_align.evaluate.results.metric import GROUPS, Outcomes, Result
from sail_align.evaluate.results.scores import SCHEMA, Record, read_scores, unfinished
from sail_align.extract.manifest import Manifest
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.progress import note

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import EvaluationSet

LIBRARIES = ("sail-align", "torch", "transformers", "timm", "numpy", "zarr", "open-clip-torch", "clip-benchmark")
"""Libraries whose versions a record names."""


class ScoreWriter:
    """Adds records to the scores of a run.

    The folder of a checkpoint or an export gets a copy of its metadata, because its weights may be removed.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder = RunFolder(run.path).scores
        self.encoders = {
            side: {"id": spec.id, "pooling": spec.pooling, "dim": spec.dim, "fingerprint": spec.fingerprint}
            for side, spec in (("image", run.image.spec), ("text", run.text.spec))
        }
        if self.folder != run.path:
            record = CONFIG if RunFolder(run.path).is_export else "model.json"
            metadata = read_file(run.path / record, "Score another one.")
            write_atomically(self.folder / "checkpoint.json", metadata)

    def add(self, data: "EvaluationSet", protocol: str, result: Result) -> Record:
        """Write the scores of a set with its examples and outcomes. Return the record.

        Args:
            data: The set.
            protocol: Id of the protocol.
            result: Scores, examples and outcomes.
        """
        record = Record(
            **_describe(data.manifest),
            protocol=protocol,
            items=result.items,
            **_resampled(result.outcomes),
            data=data.describe(result.masks),
            metrics=list(result.scores),
            details=result.details,
            run=self.run.digest,
            encoders={side: encoder["fingerprint"] for side, encoder in self.encoders.items()},
            stores={name: {"path": str(store.path), "digest": store.digest} for name, store in data.stores.items()},
            versions=_versions(),
        )
        examples = json.dumps([asdict(example) for example in result.examples]).encode()
        outcomes = save_arrays(_compact(result.outcomes), record.signature)
        record["outcomes_sha256"] = hashlib.sha256(outcomes).hexdigest()
        record["examples_sha256"] = hashlib.sha256(examples).hexdigest()
        write_atomically(record.file(self.run.path, "examples"), examples)
        write_atomically(record.file(self.run.path, "outcomes"), outcomes)
        return self.merge(record)

    def add_error(self, manifest: Manifest, reason: str) -> Record:
        """Write that a set could not be scored. Return the record."""
        return self.merge(Record(**_describe(manifest), error=reason))

    def merge(self, record: Record) -> Record:
        """Put a record into `scores.json`, in place of an older one of the same set and protocol. Return it.

        An error never replaces scores, and any record replaces an error. Scores of another checkpoint, of other
        encoders or of another schema are dropped. The folder of the run may have been renamed.
        """
        run = {"name": RunFolder(self.run.path).name, "digest": self.run.digest, "unfinished": unfinished(self.run)}
        path = self.folder / "scores.json"
        with _lock(self.folder):
            older = read_scores(path) if path.exists() else {}
            records = [Record(each) for each in older.get("records", [])]
            same = (older.get("schema"), older.get("encoders")) == (SCHEMA, self.encoders)
            if records and not (same and older["run"]["digest"] == self.run.digest):
                note(f"{path}: {len(records)} scores of another checkpoint, encoder or version are replaced.")
                records = []
            content = {"schema": SCHEMA, "run": run, "encoders": self.encoders, "records": _merge(records, record)}
            content["digest"] = content_digest(json.loads(json.dumps(content)))  # as it will be read
            write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())
        return record


def _merge(records: list[Record], new: Record) -> list[Record]:
    same_set = [each for each in records if all(each[name] == new[name] for name in ("dataset", "task"))]
    same_name = [each for each in same_set if each.name == new.name]
    if new.error and not all(each.error for each in same_name):
        return records
    replaced = [each for each in same_name if each.error]
    replaced += [each for each in same_set if not each.error and each["protocol"] == new.get("protocol")]
    # The protocols of a set stay together, so that the order does not depend on which was scored first.
    behind = max(map(records.index, same_set), default=len(records) - 1) + 1
    place = min(map(records.index, replaced), default=behind)
    kept = [each for each in records if each not in replaced]
    return [*kept[:place], new, *kept[place:]]


def _describe(manifest: Manifest) -> dict[str, Any]:
    if manifest.task is None:
        raise ValueError(f"{manifest.name} is not an evaluation set")
    variants = {"variants": list(manifest.task.variants)} if manifest.task.variants else {}
    return {"dataset": manifest.name, "title": manifest.title, "task": manifest.task.kind, **variants}


def _resampled(outcomes: Outcomes) -> dict[str, Any]:
    """Return what the intervals resample if it is not the items."""
    return {"resampled": "groups", "groups": len(np.unique(outcomes[GROUPS]))} if GROUPS in outcomes else {}


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed. Those of the extra `eval` may be missing."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _compact(outcomes: Outcomes) -> dict[str, NDArray[Any]]:
    """Return the outcomes with integers in the smallest type that holds them."""
    compact = {}
    for name, values in outcomes.items():
        if values.dtype.kind in "iu" and values.size:
            values = values.astype(np.result_type(*map(np.min_scalar_type, (values.min(), values.max()))))
        compact[name] = values
    return compact


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, so that no record is lost when two processes add one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
