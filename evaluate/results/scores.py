"""`scores.json` of a run: scores with their protocol, chance level, interval and provenance."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sail_align.align.runs.folder import CONFIG, RunFolder, damaged, read_file, read_json
from sail_align.evaluate.results.metric import Outcomes, Result
from sail_align.extract.data import describe_left_out
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import canonical_json, write_atomically
from sail_align.extract.system.progress import note

if TYPE_CHECKING:  # a report reads scores without waiting for torch
    from sail_align.align.runs.checkpoint import Run
    from sail_align.evaluate.dataset import EvaluationSet
    from sail_align.extract.manifest import Manifest

SCHEMA = 2
REMEDY = "Remove it and evaluate again."
LIBRARIES = ("sail-align", "torch", "transformers", "timm", "numpy", "zarr", "open-clip-torch", "clip-benchmark")

Key = tuple[str, str]
"""Protocol id and data digest: scores are comparable if these are equal."""


class Record(dict[str, Any]):
    """The scores of one set under one protocol, or the error that prevented them, as `scores.json` has them."""

    @property
    def name(self) -> str:
        """Data set and task."""
        return f"{self['dataset']} ({self['task']})"

    @property
    def error(self) -> str:
        """Why the set could not be scored. Empty if it was."""
        return str(self.get("error", ""))

    @property
    def key(self) -> Key:
        """Protocol and data. Scores of two runs can be compared only if both are equal."""
        return self["protocol"], self["data"]["digest"]

    @property
    def mismatch(self) -> str:
        """Message on counts that differ from the published set's. Empty if there are none."""
        data = self.get("data", {})
        counts = [
            f"{data[what]:,} {what}, not {data[f'expected_{what}']:,}"
            for what in ("rows", "captions")
            if data.get(f"expected_{what}") not in (None, data.get(what))
        ]
        return f"{self['dataset']} has {' and '.join(counts)}: its scores are of another set." if counts else ""

    @property
    def left_out(self) -> str:
        """Text about files of the set that are not used. Empty if there are none."""
        text = describe_left_out(self.get("data", {}).get("left_out", {}))
        return f"{self['dataset']}: {text}." if text else ""

    def metric(self, name: str) -> dict[str, Any] | None:
        """Return the score of a metric, or None if the record has none of that name."""
        return next((metric for metric in self.get("metrics", ()) if metric["name"] == name), None)

    def file(self, run: Path, kind: Literal["examples", "outcomes"]) -> Path:
        """Return the path of the record's examples or outcomes in a run."""
        protocol = hashlib.sha256(self["protocol"].encode()).hexdigest()[:8]
        suffix = "json" if kind == "examples" else "safetensors"
        return RunFolder(run).scores / kind / f"{self['dataset']}-{self['task']}-{protocol}.{suffix}"

    @property
    def description(self) -> dict[str, str]:
        """Data set, title and task."""
        return {field: self[field] for field in ("dataset", "title", "task") if field in self}

    @property
    def signature(self) -> dict[str, str]:
        """Metadata of the outcomes, by which they are recognised as those of this record."""
        return {"protocol": self["protocol"], "data": self["data"]["digest"], "run": self["run"]}


@dataclass(frozen=True)
class RunScores:
    """The evaluation results in the folder of a run, a checkpoint or an export.

    Attributes:
        path: The run, checkpoint or export.
        name: Name for tables, which no other run beside it has.
        content: Content of `scores.json`.
    """

    path: Path
    name: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> "RunScores":
        """Read the scores of a run.

        Raises:
            UserError: There are none, or they are damaged or of another schema.
        """
        file = RunFolder(path).scores / "scores.json"
        if not file.is_file():
            raise UserError(f"{path} has no scores.json. Run `sail-eval all --run {path}` first.")
        content = read_scores(file)
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{file} is invalid: got schema {content.get('schema')!r}, expected {SCHEMA}. Evaluate again."
            )
        records = content.get("records", [None])
        if not all(isinstance(each, dict) and {"dataset", "task"} <= each.keys() for each in records):
            raise damaged(file, REMEDY)
        return cls(path, RunFolder(path).name if name is None else name, content)

    @classmethod
    def read_all(cls, paths: Sequence[Path]) -> list["RunScores"]:
        """Read the scores of runs, each once. Runs whose folders have the same name are named by their paths.

        Raises:
            UserError: A run has no valid scores.
        """
        paths = list({RunFolder(path).scores.resolve(): path for path in paths}.values())
        names = [RunFolder(path).name for path in paths]
        return [
            cls.read(path, name if names.count(name) == 1 else str(path))
            for path, name in zip(paths, names, strict=True)
        ]

    @property
    def records(self) -> list[Record]:
        """The records of all sets, including errors."""
        return [Record(record) for record in self.content["records"]]

    @property
    def scored(self) -> list[Record]:
        """The records of the sets that were scored."""
        return [record for record in self.records if not record.error]

    @property
    def unfinished(self) -> str:
        """Training progress when the run was scored. Empty if training had ended."""
        return str(self.content["run"].get("unfinished", ""))

    @property
    def label(self) -> str:
        """The name, with how far training was if it was not finished."""
        return f"{self.name} ({self.unfinished})" if self.unfinished else self.name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run.

        Raises:
            UserError: They are missing or damaged.
        """
        copied = RunFolder(self.path).scores / "checkpoint.json"
        if copied.is_file():
            return dict(read_json(copied, REMEDY)["settings"])
        return read_json(self.path / "settings.json", "Name a run's folder.")

    @property
    def summary(self) -> list[tuple[str, str, str]]:
        """Encoders, heads, training data and checkpoint of the run as (term, value, detail)."""
        settings, run = self.settings, self.content["run"]
        facts = []
        for side, encoder in self.content["encoders"].items():
            detail = f"{encoder['pooling']} pooling, {encoder['dim']:,} dimensions, {encoder['fingerprint'][:12]}"
            facts.append((f"{side} encoder", encoder["id"], detail))
        checkpoint = ("checkpoint", run["digest"][:12], self.unfinished)
        if model := settings.get("model"):
            return [*facts, ("model", model, "embeds pictures and texts by itself"), checkpoint]
        heads = f"{settings['head']}, {settings['dim']:,} dimensions"
        if imported := settings.get("imported"):
            origin = ("imported from", imported["file"], f"SHA-256 {imported['sha256'][:12]}")
            return [*facts, ("heads", heads, ""), origin, checkpoint]
        if settings["head"] == "cca":
            made = f"computed in closed form, ridge {settings['ridge']:g}"
        else:
            made = (
                f"{settings['loss']} loss, {settings['optimizer']} at {settings['lr']:g}, "
                f"{settings['steps']:,} steps of {settings['batch_size']:,}, {settings['start']} start"
            )
        digests = settings["store_digests"]
        paths = settings.get("stores", ["store"] * len(digests))  # an export leaves them out
        stores = "; ".join(f"{path} {digest[:12]}" for path, digest in zip(paths, digests, strict=True))
        rows = f"{settings['training_rows']:,} pairs, {settings['held_out_rows']:,} held out"
        trained = ("trained on", rows, f"captions {', '.join(settings['captions'])}; {stores}")
        return [*facts, ("heads", heads, made), trained, checkpoint]

    def examples(self, record: Record) -> list[dict[str, Any]]:
        """Return the examples of a record, with the fields of `Example`."""
        path = record.file(self.path, "examples")
        try:
            return list(json.loads(path.read_bytes())) if path.is_file() else []
        except ValueError as problem:
            raise damaged(path, "Remove it to leave the examples out, or evaluate again.") from problem

    def outcomes(self, record: Record) -> dict[str, NDArray[Any]]:
        """Return the outcomes of a record.

        Raises:
            UserError: They are missing, damaged, or of another evaluation than the record.
        """
        path = record.file(self.path, "outcomes")
        remedy = (
            f"Score {record['dataset']} again with `sail-eval {record['task']} {record['dataset']} --run {self.path}`."
        )
        try:
            expected = record.get("outcomes_sha256")
            is_changed = expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected
            with safe_open(path, framework="numpy") as file:
                if file.metadata() != record.signature:
                    raise UserError(f"{path} is of another evaluation than the scores. {remedy}")
                if is_changed:
                    raise damaged(path, remedy)
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError as problem:
            raise UserError(f"{path} is missing, but a comparison needs it. {remedy}") from problem
        except (OSError, SafetensorError, ValueError) as problem:
            raise UserError(f"{path} cannot be read ({problem}). {remedy}") from problem
        # Integers are stored in the smallest type that holds them, in which sums could overflow.
        widen = {name: np.int64 for name, values in stored.items() if values.dtype.kind in "iu"}
        return {name: values.astype(widen.get(name, values.dtype)) for name, values in stored.items()}


def read_scores(path: Path) -> dict[str, Any]:
    """Return the content of a scores.json without its digest, which older versions did not write.

    Raises:
        UserError: The file cannot be read or is damaged.
    """
    content = read_json(path, REMEDY)
    digest = content.pop("digest", None)
    known = content.keys() <= {"schema", "run", "encoders", "records"}
    if (digest and digest != _digest(content)) or (content.get("schema") == SCHEMA and not known):
        raise damaged(path, REMEDY)
    if not isinstance(content.get("records", []), list) or not isinstance(content.get("run", {}), dict):
        raise damaged(path, REMEDY)
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def unfinished(run: "Run") -> str:
    """Return how far the training of a run is. Empty at its end, and for a named checkpoint.

    An export may be of any checkpoint. Only its step is known.
    """
    if run.finished or RunFolder(run.path).run.path != run.path:
        return ""
    step = f"step {run.step:,} of {run.settings['steps']:,}"
    return step if RunFolder(run.path).is_export else f"unfinished: {step}"


class ScoreWriter:
    """Adds records to the scores of a run.

    The folder of a checkpoint or an export gets a copy of its metadata, because its weights may be removed.
    """

    def __init__(self, run: "Run"):
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

    def add(self, data: "EvaluationSet", protocol: str, result: Result, seconds: float) -> Record:
        """Write the scores of a set with its examples and outcomes. Return the record.

        Args:
            data: The set.
            protocol: Id of the protocol.
            result: Scores, examples and outcomes.
            seconds: Duration of the evaluation, including encoding.
        """
        record = Record(
            **_describe(data.manifest),
            protocol=protocol,
            items=result.items,
            data=data.describe(result.masks),
            metrics=list(result.scores),
            details=result.details,
            run=self.run.digest,
            encoders={side: encoder["fingerprint"] for side, encoder in self.encoders.items()},
            stores={name: {"path": str(store.path), "digest": store.digest} for name, store in data.stores.items()},
            versions=_versions(),
            seconds=round(seconds, 2),
            encoding_seconds=round(data.encoding_seconds, 2),
        )
        examples = json.dumps([asdict(example) for example in result.examples]).encode()
        outcomes = save(_compact(result.outcomes), record.signature)
        record["outcomes_sha256"] = hashlib.sha256(outcomes).hexdigest()
        write_atomically(record.file(self.run.path, "examples"), examples)
        write_atomically(record.file(self.run.path, "outcomes"), outcomes)
        return self.merge(record)

    def add_error(self, manifest: "Manifest", reason: str) -> Record:
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
            content["digest"] = _digest(json.loads(json.dumps(content)))
            write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())
        return record


def _merge(records: list[Record], new: Record) -> list[Record]:
    same_set = [each for each in records if each.name == new.name]
    if new.error and not all(each.error for each in same_set):
        return records
    replaced = [each for each in same_set if each.error or each["protocol"] == new.get("protocol")]
    place = records.index(replaced[0]) if replaced else len(records)
    kept = [each for each in records if each not in replaced]
    return [*kept[:place], new, *kept[place:]]


def _describe(manifest: "Manifest") -> dict[str, Any]:
    if manifest.task is None:
        raise ValueError(f"{manifest.name} is not an evaluation set")
    return {"dataset": manifest.name, "title": manifest.title, "task": manifest.task.kind}


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
        compact[name] = np.ascontiguousarray(values)
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
