"""Files of a run or an export, read so that damage is one sentence, and the digests that tell it.

A `remedy` says what to do about damage, as the end of that sentence.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import canonical_json

BEGIN_AGAIN = "restore it, or begin again with another --out"
EXPORT_AGAIN = "export or download it again"
CONFIG = "config.json"
"""What an exported folder says of itself."""
CHECKPOINT_NAME = re.compile(r"(step|best)-(\d{8,})")


def is_run(path: Path) -> bool:
    """Whether a folder is a run, with or without a checkpoint."""
    return (path / "settings.json").is_file()


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint, written to its end."""
    return (folder / "model.json").is_file()


def is_export(folder: Path) -> bool:
    """Whether a folder may be one of `sail-align export`; reading it tells."""
    return (folder / CONFIG).is_file() and not is_run(folder) and not is_whole(folder)


def require_run(path: Path) -> None:
    """Raise `UserError` if a folder is neither a run nor a checkpoint."""
    if not is_run(path) and not is_whole(path):
        raise UserError(f"{path} is not a run; make one with `sail-align fit`.")


def run_of(path: Path) -> Path:
    """Return the run that a checkpoint is one of, also one that the run has removed; of any other path, itself."""
    for each in (path, path.resolve()):
        if each.parent.name in ("checkpoints", "scores") and is_run(each.parents[1]):
            return each.parents[1]
    return path


def name_of(path: Path) -> str:
    """Return a run's name, or that of one of its checkpoints: `photos-glu, step 84`."""
    run = run_of(path)
    name, folder = run.resolve().name, path.resolve().name
    if run == path:
        return name
    found = CHECKPOINT_NAME.fullmatch(folder)
    return f"{name}, step {int(found[2]):,}" if found else f"{name}, {folder}"


def scores_folder(path: Path) -> Path:
    """Return where scores are: a run's in its folder, a checkpoint's in its run's `scores/`, where they outlive it.

    Those of an export, which may be someone else's, are in `runs/`, under its name and the digest of its weights' run.
    """
    run, name = run_of(path), path.resolve().name
    if run != path:
        return run / "scores" / name
    if is_export(path):
        digest = str(read_json(path / CONFIG, EXPORT_AGAIN).get("run_digest"))
        return Path("runs") / f"{name}-{digest[:8]}"
    return path


def read_file(path: Path, remedy: str) -> bytes:
    """Return the bytes of a file. Raises `UserError` if it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); {remedy}.") from problem


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return what a JSON file holds. Raises `UserError` if it is not whole."""
    try:
        record = json.loads(read_file(path, remedy))
    except ValueError as problem:
        raise damaged(path, remedy) from problem
    if not isinstance(record, dict):
        raise damaged(path, remedy)
    return record


def damaged(path: Path, remedy: str) -> UserError:
    """Return what to raise of a file that is not as it was written."""
    return UserError(f"{path} is not what was written; {remedy}.")


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's settings that decide its weights.

    Where its stores lie, and what they hold besides, does not: stores may be moved, and get further arrays.
    """
    return {name: value for name, value in settings.items() if name not in ("stores", "store_digests")}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in what the settings of two runs differ, as the options that a user gives.

    Other encoders or captions are read from other arrays, and which rows there are follows from the rest: of these
    differences only the cause is named.
    """
    one, other = decisive(there), decisive(here)
    names = {name for name in one | other if one.get(name) != other.get(name)}
    if not names & {"image_encoder", "text_encoder", "captions"} and "features_digests" in names:
        stores = ", ".join(map(str, there.get("stores", [])))
        changed = there.get("stores") == here.get("stores")
        return (f"{stores} has changed since" if changed else f"--features: there {stores}", *_options(names))
    return _options(names)


def _options(names: set[str]) -> tuple[str, ...]:
    options = {"caption_weights": "--captions", "excluded_keys": "--exclude", "excluded_sha256": "--exclude"}
    options |= {"image_encoder": "image encoder", "text_encoder": "text encoder", "steps": "--steps or --epochs"}
    chosen = names - {"features_digests", "training_rows", "held_out_rows"}
    return tuple(sorted({options.get(name, f"--{name.replace('_', '-')}") for name in chosen}))


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all of a record but where stores lie."""
    covered = {name: value for name, value in record.items() if name != "digest"}
    if isinstance(settings := record.get("settings"), dict):
        covered["settings"] = {name: value for name, value in settings.items() if name != "stores"}
    return hashlib.sha256(canonical_json(covered)).hexdigest()
