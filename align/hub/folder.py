"""Write a run as a folder for the Hugging Face hub, and read such a folder.

FOLDER/model.safetensors   weights, τ and b
FOLDER/config.json         architecture, encoders, settings, the run's digest, and a digest of everything
FOLDER/README.md           the model card: description, scores, provenance
FOLDER/preprocessor_config.json, tokenizer_config.json
                           read by the transformers library alone (see `sail_align.transformers`)
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sail_align.align.runs.checkpoint import Checkpoint, Run
from sail_align.align.runs.folder import CONFIG, EXPORT_AGAIN, damaged, read_json, record_digest, require_digest
from sail_align.align.runs.tensors import save_tensors
from sail_align.extract.encoders.identity import require_known
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.folders import new_folder

FORMAT = 1
WEIGHTS, CARD = "model.safetensors", "README.md"
PREPROCESSOR, TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"
MODEL_TYPE = "sail"
"""Name of the architecture in transformers. Exports of earlier versions lack it, and are not read by transformers."""


def write_hub_folder(run: Run, folder: Path, card: str) -> None:
    """Write the model of a run and its card to a new folder, completely or not at all. See `hub_files`.

    Raises:
        UserError: The folder is not empty or cannot be written, or an encoder is unknown.
    """
    write_folder(folder, hub_files(run, card))


def hub_files(run: Run, card: str) -> dict[str, bytes]:
    """Return the files of an exported folder by name.

    Local paths are left out: the folder has the digests of the stores, and the encoders without their locations.

    Raises:
        UserError: An encoder is unknown.
    """
    from sail_align.align.image_processor import SailImageProcessor  # imports transformers

    require_known(run.image, run.text)
    weights = save_tensors(run.model.state_dict())
    record = {
        "model_type": MODEL_TYPE,
        "architectures": ["SailModel"],
        # Names instead of configs: other models of transformers, such as VisionTextDualEncoderModel, expect configs
        # here, and end with an error instead of loading the folder with random weights.
        "vision_config": run.image.spec.id,
        "text_config": run.text.spec.id,
        "format": FORMAT,
        "library_name": "sail-align",
        "architecture": run.architecture,
        "image": run.image.without_location().to_json(),
        "text": run.text.without_location().to_json(),
        "settings": {name: value for name, value in run.settings.items() if name != "stores"},
        "step": run.step,
        "finished": run.finished,
        "run_digest": run.digest,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["digest"] = record_digest(record)
    files = {WEIGHTS: weights, CONFIG: as_json(record), CARD: card.encode()}
    if run.image.parts or run.text.parts:  # transformers' processors are those of single encoders
        return files
    preprocessor = {**SailImageProcessor.of(run.image).to_dict(), "processor_class": "SailProcessor"}
    tokenizer = {"tokenizer_class": "SailTokenizer", "encoder": run.text.spec.to_json()}
    return {**files, PREPROCESSOR: as_json(preprocessor), TOKENIZER: as_json(tokenizer)}


def as_json(record: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file of an export."""
    return json.dumps(record, indent=1, ensure_ascii=False).encode()


def read_hub_folder(folder: Path) -> Run:
    """Read a folder of `write_hub_folder`, local or downloaded from the hub. The model is in evaluation mode.

    The digest of the returned run is that of the exported run.

    Raises:
        UserError: The folder is not an export, has another format, or is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}. Pass a run (runs/demo-linear) or a folder of `sail-align export`.")
    record = read_json(folder / CONFIG, EXPORT_AGAIN)
    if record.get("library_name") != "sail-align":
        raise UserError(f"{folder / CONFIG} was not written by `sail-align export`. Pass a folder that was.")
    if record.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {record.get('format')!r}, but this version reads format {FORMAT}. Update sail-align."
        )
    if record.get("digest") != record_digest(record):
        raise damaged(folder / CONFIG, EXPORT_AGAIN)
    digest = require_digest(record.get("run_digest"), folder / CONFIG, "run_digest")
    for side in ("image", "text"):  # a stranger's export names no folder of this machine
        if isinstance(record.get(side), dict):
            record[side] = {**record[side], "location": ""}
            if isinstance(parts := record[side].get("parts"), list):
                record[side]["parts"] = [{**part, "location": ""} for part in parts if isinstance(part, dict)]
    run = Checkpoint(folder, record, EXPORT_AGAIN).load(folder, digest)
    for name, tensor in run.model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder} is invalid: {name} contains NaN or infinity. {EXPORT_AGAIN}")
    return run


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a new folder, all of them or none.

    Raises:
        UserError: The folder is not empty or cannot be written.
    """
    with new_folder(folder, "|".join(map(re.escape, files))) as written:
        for name, content in files.items():
            write_atomically(written / name, content)
