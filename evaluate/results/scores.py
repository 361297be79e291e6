"""`scores.json` of a run, as it is read: scores with their protocol, chance level, interval and provenance."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sail_align.align.runs.folder import RunFolder, RunSettings, content_digest, damaged, read_json
from sail_align.align.settings import CLOSED_FORMS
from sail_align.evaluate.results.schema import DescriptionForm, ExampleForm, RecordForm, ScoresForm
from sail_align.extract.data import describe_left_out
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.files import read_regular
from sail_align.extract.system.validation import validated

if TYPE_CHECKING:  # a report reads scores without waiting for torch
    from sail_align.align.runs.checkpoint import Run

SCHEMA = 2
REMEDY = "Remove it and evaluate again."

Key = tuple[str, str]
"""Protocol id and data digest: scores are comparable if these are equal."""


class Record(dict[str, Any]):
    """The scores of one set under one protocol, or the error that prevented them, as `scores.json` has them."""

    @property
    def set(self) -> str:
        """Data set, and the variants of the protocol if there are any."""
        return ", ".join([self["dataset"], *self.get("variants", ())])

    @property
    def name(self) -> str:
        """Data set, variants and task."""
        return f"{self.set} ({self['task']})"

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

    @property
    def resampled(self) -> str:
        """Text about what the intervals resample. Empty if it is the items."""
        return f"intervals resample {self['groups']:,} groups" if "groups" in self else ""

    @property
    def size(self) -> str:
        """The number of items, and of groups if the intervals resample these."""
        return f"n = {self['items']:,}" + (f" in {self['groups']:,} groups" if "groups" in self else "")

    def metric(self, name: str) -> dict[str, Any] | None:
        """Return the score of a metric, or None if the record has none of that name."""
        return next((metric for metric in self.get("metrics", ()) if metric["name"] == name), None)

    def file(self, run: Path, kind: Literal["examples", "outcomes"]) -> Path:
        """Return the path of the record's examples or outcomes in a run.

        Raises:
            UserError: The names of the data set and the task lead out of the folder.
        """
        protocol = hashlib.sha256(self["protocol"].encode()).hexdigest()[:8]
        suffix = "json" if kind == "examples" else "safetensors"
        name, folder = f"{self['dataset']}-{self['task']}-{protocol}.{suffix}", RunFolder(run).scores
        if "/" in name or "\0" in name:
            raise damaged(folder / "scores.json", REMEDY)
        return folder / kind / name

    @property
    def description(self) -> dict[str, Any]:
        """Data set, title, task and variants."""
        return {field: self[field] for field in ("dataset", "title", "task", "variants") if field in self}

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
            _require_scorable(path)
            own = command("sail-eval", "retrieval", "TEST.yaml", "--run", path)
            raise UserError(
                f"{path} has no scores.json. Run `{command('sail-eval', 'all', '--run', path)}` first, or `{own}` "
                "for a set of yours."
            )
        content = read_scores(file)
        if content.get("schema") != SCHEMA:
            raise UserError(
                f"{file} is invalid: got schema {content.get('schema')!r}, expected {SCHEMA}. Evaluate again."
            )
        try:
            _require_form(content)
        except ValueError as problem:
            raise UserError(f"{file} is invalid: {problem}. {REMEDY}") from problem
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
        file = RunFolder(self.path).scores / "checkpoint.json"
        if file.is_file():
            settings = read_json(file, REMEDY).get("settings", {})
        else:
            file = self.path / "settings.json"
            settings = read_json(file, "Name a run's folder.")
        try:
            validated(RunSettings, settings)
        except ValueError as problem:
            raise UserError(f"{file} is invalid: {problem}. {REMEDY}") from problem
        return dict(settings)

    @property
    def summary(self) -> list[tuple[str, str, str]]:
        """Encoders, heads, training data and checkpoint of the run as (term, value, detail).

        Raises:
            UserError: The settings of the run are damaged.
        """
        try:
            return self._summarise(self.settings)
        except (KeyError, ValueError) as problem:
            reason = f"they have no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise UserError(f"The settings of {self.path} are invalid: {reason}. {REMEDY}") from problem

    def _summarise(self, settings: dict[str, Any]) -> list[tuple[str, str, str]]:
        run = self.content["run"]
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
        if settings["head"] in CLOSED_FORMS:
            ridge = settings["ridge"]
            chosen = "cross-validated" if ridge == "auto" else f"{ridge:g}"
            made = f"computed in closed form, ridge {chosen}"
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

    def examples(self, record: Record) -> list[ExampleForm]:
        """Return the examples of a record, with the fields of `Example`. Raises `UserError` if they are damaged."""
        path, remedy = record.file(self.path, "examples"), "Remove it to leave the examples out, or evaluate again."
        if not path.is_file():
            return []
        content = read_regular(path)
        if record.get("examples_sha256") not in (None, hashlib.sha256(content).hexdigest()):
            raise damaged(path, remedy)
        try:
            return validated(list[ExampleForm], json.loads(content))
        except (ValueError, RecursionError) as problem:
            raise damaged(path, remedy) from problem

    def outcomes(self, record: Record) -> dict[str, NDArray[Any]]:
        """Return the outcomes of a record.

        Raises:
            UserError: They are missing, damaged, or of another evaluation than the record.
        """
        path = record.file(self.path, "outcomes")
        again = command("sail-eval", record["task"], record["dataset"], "--run", self.path)
        remedy = f"Score {record['dataset']} again with `{again}`."
        try:
            expected = record.get("outcomes_sha256")
            found = hashlib.sha256(read_regular(path)).hexdigest()
            with safe_open(path, framework="numpy") as file:
                if file.metadata() != record.signature:
                    raise UserError(f"{path} is of another evaluation than the scores. {remedy}")
                if expected not in (None, found):
                    raise damaged(path, remedy)
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError as problem:
            raise UserError(f"{path} is missing, but a comparison needs it. {remedy}") from problem
        except (OSError, SafetensorError, ValueError) as problem:
            raise UserError(f"{path} cannot be read ({problem}). {remedy}") from problem
        # Integers are stored in the smallest type that holds them, in which sums could overflow.
        return {
            name: values.astype(np.int64) if values.dtype.kind in "iu" else values for name, values in stored.items()
        }


def _require_scorable(path: Path) -> None:
    """Raise `UserError` unless a path may get scores: a run, a checkpoint, even if removed since, or an export."""
    folder = RunFolder(path)
    if not (folder.is_run or folder.is_checkpoint or folder.is_export or folder.run != folder):
        found = "is not a run, a checkpoint or an exported folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}. Name a run, such as a folder in runs/.")


def read_scores(path: Path) -> dict[str, Any]:
    """Return the content of a scores.json without its digest, which older versions did not write.

    Raises:
        UserError: The file cannot be read or is damaged.
    """
    content = read_json(path, REMEDY)
    digest = content.pop("digest", None)
    known = content.keys() <= {"schema", "run", "encoders", "records"}
    if (digest and digest != content_digest(content)) or (content.get("schema") == SCHEMA and not known):
        raise damaged(path, REMEDY)
    if not isinstance(content.get("records", []), list) or not isinstance(content.get("run", {}), dict):
        raise damaged(path, REMEDY)
    return content


def _require_form(content: dict[str, Any]) -> None:
    """Raise `ValueError` unless a scores.json of this schema has all that its readers need, each of its type."""
    form = validated(ScoresForm, content)
    for number, record in enumerate(form["records"]):
        place = f"records[{number}]"
        description = validated(DescriptionForm, record, place)
        if not description.get("error"):
            validated(RecordForm, record, place)


def unfinished(run: "Run") -> str:
    """Return how far the training of a run is. Empty at its end, and for a named checkpoint.

    An export may be of any checkpoint. Only its step is known.
    """
    if run.finished or RunFolder(run.path).run.path != run.path:
        return ""
    step = f"step {run.step:,} of {run.settings['steps']:,}"
    return step if RunFolder(run.path).is_export else f"unfinished: {step}"
