"""Files of a run, found and read without torch; damaged ones are refused with a clear message.

A `remedy` completes such a message with the user's next step.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from typing_extensions import TypedDict

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import canonical_json, digest_without, read_regular, remove_own, write_atomically

BEGIN_AGAIN = "Restore it, or start again with another --out."
EXPORT_AGAIN = "Export or download it again."
CONFIG = "config.json"
"""Description of an exported folder."""

LOG_FIELDS = {
    "train": ("t", "positive_logit", "negative_logit"),
    "heldout": ("r1", "chance", "image_rank", "text_rank"),
}
"""Numbers that each kind of line of metrics.jsonl has, among others."""

DIGEST = re.compile(r"[0-9a-f]{64}")
CHECKPOINT_FILES = ("model.json", "model.safetensors", "optimizer.safetensors")
"""Files of a checkpoint. The first one marks it as complete."""


class Imported(TypedDict):
    """The file from which heads were imported."""

    file: str
    sha256: str


class RunSettings(TypedDict, total=False):
    """The settings of a run that reports and model cards show, as far as they have to be of some type."""

    head: str
    dim: int
    ridge: float | Literal["auto"]
    loss: str
    optimizer: str
    lr: float
    steps: int
    batch_size: int
    start: str
    training_rows: int
    held_out_rows: int
    captions: list[str]
    stores: list[str]
    store_digests: list[str]
    model: str
    imported: Imported


CHECKPOINT_NAME = re.compile(r"(step|best)-(\d{8,})")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, of one of its checkpoints, or of an export; reading it shows which."""

    path: Path

    @property
    def is_run(self) -> bool:
        """Whether this is a run, with or without a checkpoint."""
        return (self.path / "settings.json").is_file()

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a completely written checkpoint."""
        return (self.path / "model.json").is_file()

    @property
    def is_export(self) -> bool:
        """Whether this may be a folder of `sail-align export`."""
        return (self.path / CONFIG).is_file() and not self.is_run and not self.is_checkpoint

    def require(self) -> None:
        """Raise `UserError` if this is neither a run nor a checkpoint."""
        if not self.is_run and not self.is_checkpoint:
            raise UserError(f"{self.path} is not a run. Train one with `sail-align fit`.")

    @property
    def run(self) -> "RunFolder":
        """The run that a checkpoint belongs to, even if the checkpoint was removed; any other folder itself."""
        for each in (self.path, self.path.resolve()):
            if each.parent.name in ("checkpoints", "scores") and RunFolder(each.parents[1]).is_run:
                return RunFolder(each.parents[1])
        return self

    @property
    def name(self) -> str:
        """Name of the run, with the step of a checkpoint: `photos-linear, step 84`."""
        name, folder = self.run.path.resolve().name, self.path.resolve().name
        if self.run == self:
            return name
        found = CHECKPOINT_NAME.fullmatch(folder)
        return f"{name}, step {int(found[2]):,}" if found else f"{name}, {folder}"

    @property
    def scores(self) -> Path:
        """Folder of the scores.

        Those of a checkpoint are in its run's `scores/`, because they outlive it. Those of an export, which may belong
        to someone else, are in `runs/`, under its name and the digest of the exported run.
        """
        name = self.path.resolve().name
        if self.run != self:
            return self.run.path / "scores" / name
        if self.is_export:
            file = self.path / CONFIG
            digest = require_digest(read_json(file, EXPORT_AGAIN).get("run_digest"), file, "run_digest")
            return Path("runs") / f"{name}-{digest[:8]}"
        return self.path

    @property
    def metrics(self) -> Path:
        """Log of the run's metrics."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> dict[str, Any] | None:
        """Content of finished.json, which a run writes last: its `step` and the `metrics_sha256` of its log.

        None if the run is not finished, or was finished by an older version.
        """
        path = self.path / "finished.json"
        if not path.exists():
            return None
        record = read_json(path, BEGIN_AGAIN)
        if not (isinstance(record.get("step"), int) and isinstance(record.get("metrics_sha256"), str)):
            raise damaged(path, BEGIN_AGAIN)
        return record

    def finish(self, step: int) -> None:
        """Write finished.json."""
        record = {"step": step, "metrics_sha256": self.metrics_digest()}
        write_atomically(self.path / "finished.json", json.dumps(record).encode())

    def metrics_digest(self) -> str:
        """Return the SHA-256 of metrics.jsonl. Raises `UserError` if it cannot be read."""
        return hashlib.sha256(read_file(self.metrics, BEGIN_AGAIN)).hexdigest()

    def read_log(self, step: int) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the lines of metrics.jsonl up to a step, and their entries.

        A line after that step may be damaged, as by a power cut; it ends the log.

        Raises:
            UserError: The log ends before that step, or is damaged before it.
        """
        lines: list[str] = []
        entries: list[dict[str, Any]] = []
        for line in read_file(self.metrics, BEGIN_AGAIN).decode(errors="replace").splitlines(keepends=True):
            entry = parse_entry(line)
            if entry is None or entry["step"] > step:
                break
            lines.append(line)
            entries.append(entry)
        if [entry["step"] for entry in entries if entry["kind"] == "train"] != list(range(1, step + 1)):
            raise damaged(self.metrics, BEGIN_AGAIN)
        return lines, entries

    def open_log(self, step: int | None, digest: str | None = None) -> tuple[TextIO, list[dict[str, Any]]]:
        """Open metrics.jsonl, which has one JSON object per line with its `kind` and `step`.

        The log contains no times and no paths: a resumed run writes the same bytes as an uninterrupted one.

        Args:
            step: Step after which the run resumes; None for a new run. Later lines are removed.
            digest: SHA-256 of the log up to that step, as the checkpoint records it; None in those of earlier versions.

        Returns:
            The file, open for appending, and the entries that it has.

        Raises:
            UserError: The log ends before that step, or is damaged before it.
        """
        lines, entries = ([], []) if step is None else self.read_log(step)
        content = "".join(lines).encode()
        if digest is not None and digest != hashlib.sha256(content).hexdigest():
            raise damaged(self.metrics, BEGIN_AGAIN)
        write_atomically(self.metrics, content)
        return self.metrics.open("a"), entries

    def settings(self) -> dict[str, Any]:
        """Return the run's settings. Raises `UserError` if the file is damaged."""
        return read_json(self.path / "settings.json", BEGIN_AGAIN)

    def checkpoint(self, step: int, kind: str = "step") -> Path:
        """Return the folder of the checkpoint of a step; `kind` is "step" or "best"."""
        return self.path / "checkpoints" / f"{kind}-{step:08d}"

    def checkpoints(self, kind: str = "step", *, incomplete: bool = False) -> list[Path]:
        """Return the folders of the checkpoints of a kind by step; incomplete ones only if asked for."""
        folders = [
            path
            for path in (self.path / "checkpoints").glob(f"{kind}-*")
            if CHECKPOINT_NAME.fullmatch(path.name) and (incomplete or RunFolder(path).is_checkpoint)
        ]
        return sorted(folders, key=lambda folder: RunFolder(folder).step)

    @property
    def last(self) -> Path | None:
        """Folder of the last checkpoint, from which training resumes; None if there is none yet."""
        return next(reversed(self.checkpoints()), None)

    @property
    def step(self) -> int:
        """Number of steps in the name of a checkpoint's folder."""
        return int(self.path.name.rpartition("-")[2])

    def discard(self) -> None:
        """Remove a checkpoint, starting with the file that marks it as complete.

        Other files in its folder stay, and so does what a link in its place points to.
        """
        if not self.path.is_symlink():
            (self.path / "model.json").unlink(missing_ok=True)
        remove_own(self.path, CHECKPOINT_FILES)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps than this, and incomplete ones of any step."""
        for folder in map(RunFolder, self.checkpoints("*", incomplete=True)):
            if folder.step > step or not folder.is_checkpoint:
                folder.discard()

    @staticmethod
    def default_path(stores: Sequence[Path], kind: str) -> Path:
        """Return `runs/<store>-<kind>`, with several stores joined by `+`."""
        return Path("runs") / f"{'+'.join(path.stem for path in stores)}-{kind}"

    @staticmethod
    def newest(root: str | Path = "runs") -> Path:
        """Return the run under `root` that was saved last. Raises `UserError` if none has a checkpoint."""
        folders = [RunFolder(path) for path in Path(root).glob("*")]
        saved = {each.path: last for each in folders if each.is_run and (last := each.last)}
        if not saved:
            raise UserError(f"There is no run in {root}. Train one with `sail-align fit`.")
        return max(saved, key=lambda run: ((saved[run] / "model.json").stat().st_mtime_ns, run.name))


def parse_entry(line: str) -> dict[str, Any] | None:
    """Return the entry of a whole line of metrics.jsonl, None if it is not one."""
    try:
        entry = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or str(entry.get("kind")) not in LOG_FIELDS or type(entry.get("step")) is not int:
        return None
    numbers = (entry.get(name) for name in LOG_FIELDS[entry["kind"]])
    return entry if all(type(each) in (int, float) for each in numbers) and entry.get("t", 1) else None


def read_file(path: Path, remedy: str) -> bytes:
    """Return the bytes of a file. Raises `UserError` if it cannot be read."""
    try:
        return read_regular(path)
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}). {remedy}") from problem


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `UserError` if it cannot be read or is damaged."""
    try:
        record = json.loads(read_file(path, remedy))
    except (ValueError, RecursionError) as problem:
        raise damaged(path, remedy) from problem
    if not isinstance(record, dict):
        raise damaged(path, remedy)
    return record


def require_digest(value: object, path: Path, name: str) -> str:
    """Return a digest that a file records, before it becomes part of a path.

    Raises:
        UserError: It is not 64 hexadecimal digits. `path` is the file and `name` the field.
    """
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value
    raise UserError(
        f"{path} is invalid: got {name} {repr(value)[:100]}, expected 64 hexadecimal digits. {EXPORT_AGAIN}"
    )


def damaged(path: Path, remedy: str) -> UserError:
    """Return the error for a file whose content was changed or cut."""
    return UserError(f"{path} is damaged: its content is not what was written. {remedy}")


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of a scores.json without its digest."""
    return digest_without(content, "digest")


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a checkpoint's record, which leaves out the location of its stores."""
    covered = dict(record)
    if isinstance(settings := record.get("settings"), dict):
        covered["settings"] = {name: value for name, value in settings.items() if name != "stores"}
    return digest_without(covered, "digest")


def quality(scores: Mapping[str, Any] | None) -> float | None:
    """Return the held-out score by which the best weights of a run are chosen; None if there is none.

    It is the mean reciprocal rank, which takes all ranks into account where R@1 sees the first alone. Checkpoints of
    earlier versions have R@1 alone.
    """
    found = next((scores[name] for name in ("mrr", "r1") if name in scores), None) if isinstance(scores, dict) else None
    return float(found) if isinstance(found, int | float) else None


def run_digest(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings that decide a run's weights: its identity.

    The location of its stores is left out, and so is the digest of everything in them: stores may be moved, and other
    arrays may be added.
    """
    return hashlib.sha256(canonical_json(_decisive(settings))).hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the differences between the settings of two runs: the option that a user gives, its old and its new value.

    Other encoders or captions imply other arrays, and the number of rows follows from the rest. Only causes are named.
    """
    one, other = _decisive(there), _decisive(here)
    names = {name for name in one | other if one.get(name) != other.get(name)}
    causes = names - {"features_digests", "training_rows", "held_out_rows", "image_encoders", "text_encoders"}
    options = {_OPTIONS.get(name, f"--{name.replace('_', '-')}"): name for name in sorted(causes)}
    named = tuple(
        f"{option}: {_shown(one, name)}, now {_shown(other, name)}" for option, name in sorted(options.items())
    )
    if not names & {"image_encoder", "text_encoder", "captions"} and "features_digests" in names:
        before, now = (", ".join(map(str, settings.get("stores", []))) for settings in (there, here))
        return (f"{before} has changed since" if before == now else f"--features: {before}, now {now}", *named)
    return named or (("rows used",) if names else ())


_OPTIONS = {
    "captions": "--captions",
    "caption_weights": "--captions",
    "excluded_keys": "--exclude",
    "excluded_sha256": "--exclude",
    "image_encoder": "image encoder",
    "text_encoder": "text encoder",
    "steps": "--steps or --epochs",
}
"""Options whose names are not those of the settings."""


def _shown(settings: Mapping[str, Any], name: str) -> str:
    """Return the value of a setting for a message, as a user gives it."""
    if name in ("captions", "caption_weights"):
        names = settings.get("captions", [])
        weights = settings.get("caption_weights") or [1] * len(names)
        return ",".join(
            each if weight == 1 else f"{each}:{weight:g}" for each, weight in zip(names, weights, strict=False)
        )
    if name.startswith("excluded"):
        count = settings.get("excluded_keys")
        return "none" if count is None else f"{count:,} keys ({str(settings.get('excluded_sha256'))[:8]})"
    value = settings.get(name)
    if name.endswith("_encoder"):
        return str(value)[:8]
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)[:80]


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("stores", "store_digests")}
