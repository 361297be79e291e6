"""Write a run as a folder for the Hugging Face hub, and read such a folder.

FOLDER/model.safetensors   weights, τ and b
FOLDER/config.json         architecture, encoders, settings, the run's digest, and a digest of everything
FOLDER/README.md           the model card: description, scores, provenance
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from sail_align.align.runs.checkpoint import Checkpoint, Run
from sail_align.align.runs.folder import CONFIG, EXPORT_AGAIN, damaged, read_json, record_digest
from sail_align.align.runs.tensors import save_tensors
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import report_write_errors, write_atomically

FORMAT = 1
WEIGHTS, CARD = "model.safetensors", "README.md"


def write_hub_folder(run: Run, folder: Path, card: str) -> None:
    """Write the model of a run and its card to a new folder, completely or not at all.

    Local paths are left out: the folder has the digests of the stores, and the encoders without their locations.

    Raises:
        UserError: The folder is not empty or cannot be written.
    """
    weights = save_tensors(run.model.state_dict())
    record = {
        "format": FORMAT,
        "library_name": "sail-align",
        "architecture": run.architecture,
        "image": {**run.image.to_json(), "location": ""},
        "text": {**run.text.to_json(), "location": ""},
        "settings": {name: value for name, value in run.settings.items() if name != "stores"},
        "step": run.step,
        "finished": run.finished,
        "run_digest": run.digest,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["digest"] = record_digest(record)
    config = json.dumps(record, indent=1, ensure_ascii=False).encode()
    write_folder(folder, {WEIGHTS: weights, CONFIG: config, CARD: card.encode()})


def read_hub_folder(folder: Path) -> Run:
    """Read a folder of `write_hub_folder`, local or downloaded from the hub. The model is in evaluation mode.

    The digest of the returned run is that of the exported run.

    Raises:
        UserError: The folder is not an export, has another format, or is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}. Pass a folder written by `sail-align export`.")
    record = read_json(folder / CONFIG, EXPORT_AGAIN)
    if record.get("library_name") != "sail-align":
        raise UserError(f"{folder / CONFIG} was not written by `sail-align export`. Pass a folder that was.")
    if record.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {record.get('format')!r}, but this version reads format {FORMAT}. Update sail-align."
        )
    if record.get("digest") != record_digest(record):
        raise damaged(folder / CONFIG, EXPORT_AGAIN)
    for side in ("image", "text"):  # no folder of this machine, whatever a stranger wrote here
        record[side] = {**record[side], "location": ""}
    return Checkpoint(folder, record, EXPORT_AGAIN).load(folder, record["run_digest"])


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a new folder, all of them or none.

    Raises:
        UserError: The folder is not empty or cannot be written.
    """
    if folder.name in ("", "..") or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} exists already. Remove it, or pass another --out.")
    written = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(written, ignore_errors=True)
        with report_write_errors(folder):
            for name, content in files.items():
                write_atomically(written / name, content)
            written.replace(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)
