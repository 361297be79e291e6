"""`scores.json` of a run: numbers with protocol, chance, interval, and where they come from."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sail_align.align.checkpoint import Run
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.results import Result
from sail_align.extract.encoders.base import Identity
from sail_align.extract.errors import UserError
from sail_align.extract.files import write_atomically
from sail_align.extract.manifest import Manifest

SCHEMA = 1
LIBRARIES = ("sail-align", "torch", "transformers", "timm", "numpy", "zarr")

Record = dict[str, Any]


def score_record(data: EvaluationSet, protocol: str, result: Result, seconds: float) -> Record:
    """Return one set's scores as a record of `scores.json`."""
    stores = data.stores.items()
    return {
        **_about(data.manifest),
        "protocol": protocol,
        "items": result.items,
        "metrics": [asdict(metric) for metric in result.metrics],
        "details": result.details,
        "stores": {name: {"path": str(store.path), "digest": store.digest} for name, store in stores},
        "versions": {name: version(name) for name in LIBRARIES},
        "seconds": round(seconds, 1),
    }


def error_record(manifest: Manifest, problem: Exception) -> Record:
    """Return the record of a set that could not be scored."""
    return {**_about(manifest), "error": " ".join(str(problem).split())}


def failed(records: list[Record]) -> bool:
    """Whether a record is an error."""
    return any("error" in record for record in records)


def merge_scores(run: Run, records: list[Record]) -> None:
    """Put records into the run's `scores.json`, in the place of older ones of the same set.

    An error takes no score's place. Scores of another checkpoint, of other encoders or of another schema are dropped;
    the run's folder may have another name by now.
    """
    head = {
        "schema": SCHEMA,
        "run": {
            "name": run.path.resolve().name,
            "digest": run.digest,
            "unfinished": unfinished(run),
        },
        "encoders": {"image": _encoder(run.image), "text": _encoder(run.text)},
    }
    path = scores_path(run.path)
    older = json.loads(path.read_bytes()) if path.exists() else {}
    merged = {record["dataset"]: record for record in older["records"]} if _of_same_weights(older, head) else {}
    for record in records:
        if "error" not in record or "error" in merged.get(record["dataset"], record):
            merged[record["dataset"]] = record
    content = {**head, "records": list(merged.values())}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def unfinished(run: Run) -> str:
    """Return how far a run is that has not been trained to its end, "" for one that has."""
    return "" if run.finished else f"unfinished: step {run.step:,} of {run.settings['steps']:,}"


def read_scores(run: Path) -> dict[str, Any]:
    """Read the `scores.json` of a run.

    Raises:
        UserError: There is none, or it is of another schema.
    """
    path = scores_path(run)
    if not path.is_file():
        raise UserError(f"{run} has no scores.json; run `sail-eval all --run {run}` first.")
    scores: dict[str, Any] = json.loads(path.read_bytes())
    if scores.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {scores.get('schema')!r}, this version reads {SCHEMA}; evaluate again.")
    return scores


def scores_path(run: Path) -> Path:
    """Return where a run's scores are."""
    return run / "scores.json"


def examples_path(run: Path, dataset: str) -> Path:
    """Return where the examples of one set are, for the report."""
    return run / "examples" / f"{dataset}.json"


def _of_same_weights(older: dict[str, Any], head: dict[str, Any]) -> bool:
    same = all(older.get(name) == head[name] for name in ("schema", "encoders"))
    return same and older["run"]["digest"] == head["run"]["digest"]


def _about(manifest: Manifest) -> Record:
    if manifest.task is None:
        raise ValueError(f"{manifest.name} is no evaluation set")
    return {"dataset": manifest.name, "title": manifest.title, "task": manifest.task.kind}


def _encoder(identity: Identity) -> dict[str, Any]:
    spec = identity.spec
    return {"id": spec.id, "pooling": spec.pooling, "dim": spec.dim, "fingerprint": spec.fingerprint}
