"""`scores.json` of a run: numbers with protocol, chance, interval, and where they come from."""

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

from sail_align.align.runs.folder import CONFIG, is_export, name_of, read_file, read_json, run_of, scores_folder
from sail_align.evaluate.results.metric import Result
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.progress import note

if TYPE_CHECKING:  # a report reads scores, and need not wait for torch
    from sail_align.align.runs.checkpoint import Run
    from sail_align.evaluate.dataset import EvaluationSet
    from sail_align.extract.encoders.base import Identity
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sail_align.evaluate.results.metric import Outcomes

SCHEMA = 2
AGAIN = "remove it and evaluate again"
LIBRARIES = ("sail-align", "torch", "transformers", "timm", "numpy", "zarr", "open-clip-torch", "clip-benchmark")

Record = dict[str, Any]


def score_record(data: "EvaluationSet", protocol: str, result: Result, seconds: float) -> Record:
    """Return one set's scores as a record of `scores.json`: what was measured, how, on what, with what.

    Args:
        data: The set; its stores and the time it took to fill them are part of the record.
        protocol: The protocol's id.
        result: What was measured.
        seconds: How long it took, encoding included.
    """
    stores = data.stores.items()
    encoders = {"image": data.run.image, "text": data.run.text}
    return {
        **_about(data.manifest),
        "protocol": protocol,
        "items": result.items,
        "data": _data(data, result.masks),
        "metrics": [asdict(metric) for metric in result.metrics],
        "details": result.details,
        "run": data.run.digest,
        "encoders": {side: identity.spec.fingerprint for side, identity in encoders.items()},
        "stores": {name: {"path": str(store.path), "digest": store.digest} for name, store in stores},
        "versions": _versions(),
        "seconds": round(seconds, 2),
        "encoding_seconds": round(data.encoding_seconds, 2),
    }


def error_record(manifest: Manifest, problem: Exception) -> Record:
    """Return the record of a set that could not be scored."""
    return {**_about(manifest), "error": " ".join(str(problem).split())}


def failed(records: list[Record]) -> bool:
    """Whether a record is an error."""
    return any("error" in record for record in records)


def unexpected(record: Record) -> str:
    """Return a sentence on a set with other counts than expected: its scores are not the published set's. Else ""."""
    data = record.get("data", {})
    found = [
        f"{data[what]:,} {what}, not {data[f'expected_{what}']:,}"
        for what in ("rows", "captions")
        if data.get(f"expected_{what}") not in (None, data.get(what))
    ]
    return f"{record['dataset']} has {' and '.join(found)}: its scores are of another set." if found else ""


def open_scores(run: "Run") -> None:
    """Make the folder for the scores of a run.

    Of a checkpoint or an export it gets what that says of itself, with its digests: it may be removed.
    """
    folder = scores_folder(run.path)
    if folder != run.path:
        said = read_file(run.path / (CONFIG if is_export(run.path) else "model.json"), "score another one")
        write_atomically(folder / "checkpoint.json", said)


def settings_of(path: Path) -> dict[str, Any]:
    """Return the settings of a run, a checkpoint or an export that has scores.

    Raises:
        UserError: They are not there, or damaged.
    """
    said = scores_folder(path) / "checkpoint.json"
    if said.is_file():
        return dict(read_json(said, AGAIN)["settings"])
    return read_json(path / "settings.json", "name a run's folder")


def merge_score(run: "Run", record: Record) -> None:
    """Put a record into the run's `scores.json`, in the place of an older one of the same set and protocol.

    An error takes no score's place, and gives way to any. Scores of another checkpoint, of other encoders or of another
    schema are dropped; the run's folder may have another name by now.
    """
    head = {
        "schema": SCHEMA,
        "run": {
            "name": name_of(run.path),
            "digest": run.digest,
            "unfinished": unfinished(run),
        },
        "encoders": {"image": _encoder(run.image), "text": _encoder(run.text)},
    }
    path = scores_path(run.path)
    with _alone(path.parent):
        older = read_json(path, AGAIN) if path.exists() else {}
        there: list[Record] = older.get("records", [])
        kept = there if _of_same_weights(older, head) else []
        if len(kept) < len(there):
            note(f"{path}: {len(there)} scores of another checkpoint, encoder or version give way.")
        content = {**head, "records": _merged(kept, record)}
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def unfinished(run: "Run") -> str:
    """Return how far a run is that has not been trained to its end; "" for one that has, and for a named checkpoint.

    An export may be of a chosen checkpoint: of it only the step is known.
    """
    if run.finished or run_of(run.path) != run.path:
        return ""
    step = f"step {run.step:,} of {run.settings['steps']:,}"
    return step if is_export(run.path) else f"unfinished: {step}"


def named(name: str, scores: dict[str, Any]) -> str:
    """Return a run's name, with how far it was when it was scored if that was not its end."""
    unfinished = scores["run"].get("unfinished")
    return f"{name} ({unfinished})" if unfinished else name


def read_scores(run: Path) -> dict[str, Any]:
    """Read the `scores.json` of a run.

    Raises:
        UserError: There is none, or it is damaged or of another schema.
    """
    path = scores_path(run)
    if not path.is_file():
        raise UserError(f"{run} has no scores.json; run `sail-eval all --run {run}` first.")
    scores = read_json(path, AGAIN)
    if scores.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {scores.get('schema')!r}, this version reads {SCHEMA}; evaluate again.")
    return scores


def scores_path(run: Path) -> Path:
    """Return where the scores of a run, or of one of its checkpoints, are."""
    return scores_folder(run) / "scores.json"


def examples_path(run: Path, record: Record) -> Path:
    """Return where the examples of one set under one protocol are, for the report."""
    return scores_folder(run) / "examples" / f"{_file_name(record)}.json"


def outcomes_path(run: Path, record: Record) -> Path:
    """Return where the outcomes by item of one set under one protocol are, for comparisons."""
    return scores_folder(run) / "outcomes" / f"{_file_name(record)}.safetensors"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process into the same block for this folder: of two that read, add and write, one would be lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _file_name(record: Record) -> str:
    told_apart = hashlib.sha256(record.get("protocol", "").encode()).hexdigest()[:8]
    return f"{record['dataset']}-{record['task']}-{told_apart}"


def _merged(records: list[Record], new: Record) -> list[Record]:
    """Return records with a new one in its place."""
    same_set = [each for each in records if (each["dataset"], each["task"]) == (new["dataset"], new["task"])]
    if "error" in new and any("error" not in each for each in same_set):
        return records
    replaced = [each for each in same_set if "error" in each or each["protocol"] == new.get("protocol")]
    place = records.index(replaced[0]) if replaced else len(records)
    kept = [each for each in records if each not in replaced]
    return [*kept[:place], new, *kept[place:]]


def _data(data: "EvaluationSet", masks: str) -> dict[str, Any]:
    """Return what a set has, and what its manifest expects of it."""
    from sail_align.evaluate.dataset import digest_of

    samples, about = data.samples, data.manifest
    return {
        "digest": digest_of([data.digest, masks]) if masks else data.digest,
        "rows": len(samples),
        "expected_rows": about.expected_rows,
        "captions": sum(len(sample.captions) for sample in samples),
        "expected_captions": about.expected_captions,
    }


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed; those of the extra `eval` may not be."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _of_same_weights(older: dict[str, Any], head: dict[str, Any]) -> bool:
    same = all(older.get(name) == head[name] for name in ("schema", "encoders"))
    return same and older["run"]["digest"] == head["run"]["digest"]


def _about(manifest: Manifest) -> Record:
    if manifest.task is None:
        raise ValueError(f"{manifest.name} is no evaluation set")
    return {"dataset": manifest.name, "title": manifest.title, "task": manifest.task.kind}


def _encoder(identity: "Identity") -> dict[str, Any]:
    spec = identity.spec
    return {"id": spec.id, "pooling": spec.pooling, "dim": spec.dim, "fingerprint": spec.fingerprint}


def save_outcomes(run: Path, record: Record, outcomes: Outcomes) -> None:
    """Write a record's outcomes into the run, integers in the smallest type that holds them."""
    compact = {name: np.ascontiguousarray(_compact(values)) for name, values in outcomes.items()}
    write_atomically(outcomes_path(run, record), save(compact, _signature(record)))


def load_outcomes(run: Path, record: Record) -> dict[str, NDArray[Any]]:
    """Read the outcomes of a record of the run.

    Raises:
        UserError: They are not there, damaged, or of another evaluation than the record.
    """
    path = outcomes_path(run, record)
    again = f"score {record['dataset']} again with `sail-eval {record['task']} {record['dataset']} --run {run}`."
    try:
        with safe_open(path, framework="numpy") as file:
            if file.metadata() != _signature(record):
                raise UserError(f"{path} is of another evaluation than the scores; {again}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as problem:
        raise UserError(f"{path} is not there, which a comparison needs; {again}") from problem
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path} cannot be read ({problem}); {again}") from problem


def _signature(record: Record) -> dict[str, str]:
    return {"protocol": record["protocol"], "data": record["data"]["digest"], "run": record["run"]}


def _compact(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "iu" or not values.size:
        return values
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))
