"""What a run saves: tensors in safetensors, all else in JSON, in a folder that is replaced whole.

RUN/settings.json                      what decides the weights; written when the run begins
RUN/metrics.jsonl                      one JSON object a line
RUN/checkpoint/model.safetensors       weights, τ and b
RUN/checkpoint/model.json              settings, architecture, encoders, step, and the digest of it all
RUN/checkpoint/optimizer.safetensors   the optimiser's state; not there once the run is finished
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from sail_align.align.model import AlignmentModel, Architecture
from sail_align.extract.encoders.base import Identity
from sail_align.extract.errors import UserError
from sail_align.extract.files import canonical_json, write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A run's model as last saved, in evaluation mode, and the encoders whose features it takes.

    `settings` is everything that decided the weights, the stores' digests included. `digest` is over weights, settings
    and encoders: what score files record. `step` is how many steps were done, `finished` whether those are all.
    """

    path: Path
    model: AlignmentModel
    image: Identity
    text: Identity
    settings: dict[str, Any]
    digest: str
    step: int = 0
    finished: bool = True


def save_checkpoint(
    run: Path,
    model: AlignmentModel,
    about: Mapping[str, Any],
    *,
    step: int,
    optimizer: Optimizer | None,
) -> None:
    """Replace a run's checkpoint, so that a process killed at any point leaves the old one or the new one.

    Args:
        run: The run's folder.
        model: What to save.
        about: `architecture`, `image` and `text` (encoders' identities) and `settings`, as JSON-able data.
        step: Steps done.
        optimizer: Its state goes along; None says that the run is finished.
    """
    written, current, replaced = (run / name for name in (".checkpoint.new", "checkpoint", ".checkpoint.old"))
    shutil.rmtree(written, ignore_errors=True)
    weights = save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()})
    record = {"format": FORMAT, **about, "step": step, "finished": optimizer is None}
    record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    record["digest"] = _digest(record)
    write_atomically(written / "model.safetensors", weights)
    if optimizer is not None:
        write_atomically(written / "optimizer.safetensors", save(_optimizer_state(model, optimizer)))
    write_atomically(written / "model.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    if current.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        current.rename(replaced)
    written.rename(current)
    shutil.rmtree(replaced, ignore_errors=True)


def load_run(path: str | Path) -> Run:
    """Load the model that a run saved last, on the CPU.

    Raises:
        UserError: The path is not a run, has no checkpoint yet, or its checkpoint is damaged or of a later format.
    """
    path = Path(path)
    if not is_run(path):
        raise UserError(f"{path} is not a run; make one with `sail-align fit`.")
    record = read_record(path)
    if record is None:
        raise UserError(f"{path} has no checkpoint yet; let its `sail-align fit` go on.")
    model = Architecture(**record["architecture"]).build()
    restore(path, model)
    image, text = (Identity.from_json(record[side]) for side in ("image", "text"))
    about = {name: record[name] for name in ("settings", "digest", "step", "finished")}
    return Run(path, model.eval(), image, text, **about)


def newest_run(root: str | Path = "runs") -> Path:
    """Return the run under `root` that was saved last.

    Raises:
        UserError: There is none with a checkpoint.
    """
    saved = {run: folder for run in Path(root).glob("*") if is_run(run) and (folder := _checkpoint(run))}
    if not saved:
        raise UserError(f"There is no run under {root}; make one with `sail-align fit`.")
    return max(saved, key=lambda run: (_saved_at(saved[run]), run.name))


def is_run(path: Path) -> bool:
    """Whether a folder is a run, with or without a checkpoint."""
    return (path / "settings.json").is_file()


def read_record(run: Path) -> dict[str, Any] | None:
    """Return a run's model.json, None if it has no checkpoint yet.

    Raises:
        UserError: It is of a later format, or not what the run wrote.
    """
    if (folder := _checkpoint(run)) is None:
        return None
    record = read_json(folder / "model.json")
    if record.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {record.get('format')!r}, this version reads {FORMAT}; update sail-align."
        )
    if record.get("digest") != _digest(record):
        raise _damaged(folder / "model.json")
    return record


def read_file(path: Path) -> bytes:
    """Return the bytes of a run's file. Raises `UserError` if it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); train again or restore the file.") from problem


def read_json(path: Path) -> dict[str, Any]:
    """Return what a run's JSON file holds. Raises `UserError` if it is not whole."""
    try:
        record = json.loads(read_file(path))
    except ValueError as problem:
        raise _damaged(path) from problem
    if not isinstance(record, dict):
        raise _damaged(path)
    return record


def restore(run: Path, model: AlignmentModel, optimizer: Optimizer | None = None) -> None:
    """Load the weights that a run saved last into a model, and the optimiser's state into an optimiser.

    Raises:
        UserError: The file is not what was written, or its tensors are not the model's; the sentence names the first
            that differs.
    """
    folder, record = _checkpoint(run), read_record(run)
    if folder is None or record is None:
        raise UserError(f"{run} has no checkpoint.")
    weights = read_file(folder / "model.safetensors")
    if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
        raise _damaged(folder / "model.safetensors")
    saved = load(weights)
    _require_same_tensors(saved, model.state_dict(), folder)
    model.load_state_dict(saved)
    if optimizer is not None:
        file = folder / "optimizer.safetensors"
        try:
            state = load(read_file(file))
        except SafetensorError as problem:
            raise _damaged(file) from problem
        parameters = dict(model.named_parameters())
        for name, tensor in state.items():
            parameter, slot = name.rsplit("/", 1)
            where = parameters[parameter]
            # torch's optimisers keep their step counter on the CPU.
            optimizer.state[where][slot] = tensor if slot == "step" else tensor.to(where.device)


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings less where its stores lie: their digests say which they are, wherever they are moved."""
    return {name: value for name, value in settings.items() if name != "stores"}


def _digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all of a record that decides the weights."""
    covered = {name: value for name, value in record.items() if name != "digest"}
    covered["settings"] = decisive(record.get("settings", {}))
    return hashlib.sha256(canonical_json(covered)).hexdigest()


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is not what the run wrote; train again or restore the file.")


def _checkpoint(run: Path) -> Path | None:
    """Return the folder of the whole checkpoint; between two renames of `save_checkpoint` it is the old one."""
    folders = (run / "checkpoint", run / ".checkpoint.old")
    return next((folder for folder in folders if (folder / "model.json").is_file()), None)


def _saved_at(folder: Path) -> int:
    try:
        return (folder / "model.json").stat().st_mtime_ns
    except FileNotFoundError:  # the run is saving at this moment: no other is newer
        return time.time_ns()


def _optimizer_state(model: AlignmentModel, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{slot}": value.cpu().contiguous()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def _require_same_tensors(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    for name in (*expected, *saved):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (saved, expected)]
        if shapes[0] != shapes[1]:
            there, here = (f"of shape {shape}" if shape is not None else "absent" for shape in shapes)
            raise UserError(f"{folder} does not fit this model: {name} is {there} in the file and {here} in the model.")
