"""What a run saves: tensors in safetensors, all else in JSON.

RUN/settings.json                     what decides the weights; written when the run begins
RUN/metrics.jsonl                     one JSON object a line
RUN/checkpoints/step-00001200/        what training goes on from; of a finished run, what it ends with
    model.safetensors                 weights, τ and b
    optimizer.safetensors             the optimiser's state; not there once the run is finished
    model.json                        settings, architecture, encoders, step, the stream's state, held-out scores, and
                                      the digest of it all; written last: a folder without it does not exist
RUN/checkpoints/best-00001100/        the weights that scored best, where those are not the last; no optimiser's state

The rate and the random numbers of a step are functions of the settings and of its number: nothing of them is saved.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from sail_align.align.data.sampler import StreamState
from sail_align.align.model.alignment import AlignmentModel, Architecture
from sail_align.align.runs.folder import (
    CHECKPOINT_NAME,
    damaged,
    is_run,
    is_whole,
    read_file,
    read_json,
    record_digest,
    require_run,
)
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically

FORMAT = 2

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A run's model as saved, in evaluation mode, and the encoders whose features it takes.

    `settings` is everything that decided the weights, the stores' digests included. `digest` is over weights, settings
    and encoders: what score files record. `step` is how many steps were done, `finished` whether those are all, and
    `architecture` what decides the model's shape.
    """

    path: Path
    model: AlignmentModel
    image: Identity
    text: Identity
    settings: dict[str, Any]
    digest: str
    step: int = 0
    finished: bool = True
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and what its model.json says."""

    folder: Path
    record: dict[str, Any]


def save_checkpoint(
    run: Path,
    model: AlignmentModel,
    about: Mapping[str, Any],
    *,
    step: int,
    optimizer: Optimizer | None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Save what training goes on from, or the model of a finished run; a process killed at any point loses nothing.

    Args:
        run: The run's folder.
        model: What to save.
        about: `architecture`, `image` and `text` (encoders' identities) and `settings`, as JSON-able data; `stream`,
            the state of the stream, where training goes on.
        step: Steps done.
        optimizer: Its state goes along; None says that the run is finished.
        scores: What the model scored on held-out pairs, if it was scored at this step.
    """
    state = None if optimizer is None else _optimizer_state(model, optimizer)
    record = {**about, "step": step, "finished": optimizer is None, "scores": dict(scores or {})}
    write_checkpoint(checkpoint_folder(run, step), model.state_dict(), record, state)


def write_checkpoint(folder: Path, weights: Tensors, record: Mapping[str, Any], optimizer: Tensors | None) -> None:
    """Write a checkpoint's folder, in the place of one that is there."""
    discard(folder)
    content = save({name: tensor.cpu().contiguous() for name, tensor in weights.items()})
    record = {"format": FORMAT, **record, "weights_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / "model.safetensors", content)
    if optimizer is not None:
        state = save(dict(optimizer))
        record["optimizer_sha256"] = hashlib.sha256(state).hexdigest()
        write_atomically(folder / "optimizer.safetensors", state)
    record["digest"] = record_digest(record)
    write_atomically(folder / "model.json", json.dumps(record, indent=1, ensure_ascii=False).encode())


def load_run(path: str | Path) -> Run:
    """Load the model that a run saved last, or that of one of its checkpoints, on the CPU.

    Args:
        path: The run's folder, or that of the checkpoint.

    Raises:
        UserError: The path is neither, the run has no checkpoint yet, or it is damaged or of another format.
    """
    path = Path(path)
    require_run(path)
    checkpoint = read_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoint yet; let its `sail-align fit` go on.")
    record = checkpoint.record
    model = Architecture(**record["architecture"]).build()
    restore(checkpoint, model)
    image, text = (Identity.from_json(record[side]) for side in ("image", "text"))
    about = {name: record[name] for name in ("settings", "digest", "step", "finished", "architecture")}
    return Run(path, model.eval(), image, text, **about)


def newest_run(root: str | Path = "runs") -> Path:
    """Return the run under `root` that was saved last.

    Raises:
        UserError: There is none with a checkpoint.
    """
    saved = {run: folder for run in Path(root).glob("*") if is_run(run) and (folder := last_checkpoint(run))}
    if not saved:
        raise UserError(f"There is no run under {root}; make one with `sail-align fit`.")
    return max(saved, key=lambda run: ((saved[run] / "model.json").stat().st_mtime_ns, run.name))


def checkpoint_folder(run: Path, step: int, kind: str = "step") -> Path:
    """Return where a run's checkpoint of a step is; `kind` is "step" or "best"."""
    return run / "checkpoints" / f"{kind}-{step:08d}"


def checkpoint_folders(run: Path, kind: str = "step") -> list[Path]:
    """Return the folders of a run's whole checkpoints, by step."""
    return sorted((path for path in begun_folders(run, kind) if is_whole(path)), key=step_of)


def begun_folders(run: Path, kind: str = "*") -> list[Path]:
    """Return the folders of a run's checkpoints, whole or not. What else lies there, such as a copy, is none."""
    return [path for path in (run / "checkpoints").glob(f"{kind}-*") if CHECKPOINT_NAME.fullmatch(path.name)]


def step_of(folder: Path) -> int:
    """Return the number of steps that a checkpoint's folder is named after."""
    return int(folder.name.rpartition("-")[2])


def last_checkpoint(run: Path) -> Path | None:
    """Return the folder that a run goes on from or, once it is finished, ends with; None if there is none yet."""
    return next(reversed(checkpoint_folders(run)), None)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Read the model.json of a checkpoint's folder, or of a run's last one; None if it has none yet.

    Raises:
        UserError: It is of another format, or not what the run wrote.
    """
    folder = path if is_whole(path) else last_checkpoint(path)
    if folder is None:
        return None
    record = read_json(folder / "model.json", remedy(folder))
    if record.get("format", FORMAT) != FORMAT:
        raise UserError(f"{folder} has format {record['format']!r}, this version reads {FORMAT}; update sail-align.")
    if record.get("digest") != record_digest(record):
        raise damaged(folder / "model.json", remedy(folder))
    return Checkpoint(folder, record)


def remedy(folder: Path) -> str:
    """Say what to do about a damaged checkpoint."""
    return f"restore it, or remove {folder}: the run's command then goes on from what was saved before"


def restore(checkpoint: Checkpoint, model: AlignmentModel, optimizer: Optimizer | None = None) -> None:
    """Load a checkpoint's weights into a model, and the optimiser's state into an optimiser.

    Raises:
        UserError: A file is not what was written, or its tensors are not the model's; the sentence names the first
            that differs.
    """
    load_weights(model, checkpoint.folder, _read_tensors(checkpoint, "model", "weights_sha256"))
    if optimizer is not None:
        parameters = dict(model.named_parameters())
        for name, tensor in load(_read_tensors(checkpoint, "optimizer", "optimizer_sha256")).items():
            parameter, slot = name.rsplit("/", 1)
            where = parameters[parameter]
            # torch's optimisers keep their step counter on the CPU.
            optimizer.state[where][slot] = tensor if slot == "step" else tensor.to(where.device)


def load_weights(model: AlignmentModel, folder: Path, content: bytes) -> None:
    """Load the content of a folder's safetensors file into a model.

    Raises:
        UserError: Its tensors are not the model's; the sentence names the first that differs.
    """
    saved, expected = load(content), model.state_dict()
    for name in (*expected, *saved):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (saved, expected)]
        if shapes[0] != shapes[1]:
            there, here = (f"of shape {shape}" if shape is not None else "absent" for shape in shapes)
            raise UserError(f"{folder} does not fit this model: {name} is {there} in the file and {here} in the model.")
    model.load_state_dict(saved)


def discard(folder: Path) -> None:
    """Remove a checkpoint, what makes it one first."""
    (folder / "model.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _read_tensors(checkpoint: Checkpoint, name: str, digest: str) -> bytes:
    file = checkpoint.folder / f"{name}.safetensors"
    content = read_file(file, remedy(checkpoint.folder))
    if hashlib.sha256(content).hexdigest() != checkpoint.record.get(digest):
        raise damaged(file, remedy(checkpoint.folder))
    return content


def _optimizer_state(model: AlignmentModel, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{slot}": value.cpu().contiguous()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


SAVE_SECONDS = 60.0
"""A run is saved after the step at which so much time has passed: saving large heads takes longer than small steps."""

KEEP = 2
"""How many checkpoints that training can go on from are kept."""


class Best(NamedTuple):
    """The checkpoint that scored best on held-out pairs, its step, and its mean R@1 in percent."""

    folder: Path
    step: int
    r1: float


class Saver:
    """Saves a run: the last few checkpoints, and the weights that scored best on held-out pairs (mean R@1 both ways).

    The best weights wait in memory for the next save, so that a small run which scores often is not slowed by it. A
    run killed in between goes on from its last checkpoint and finds them again.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], *, keep: int = KEEP, seconds: float = SAVE_SECONDS):
        """Take over a run as it was left; what lies behind its last checkpoint will be made again, and goes."""
        self._run, self._about = run, about
        self._keep, self._seconds = keep, seconds
        self._saved = time.monotonic()
        self._waiting: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._scored: tuple[int, Mapping[str, float]] = (-1, {})
        last = last_checkpoint(run)
        for folder in begun_folders(run):
            if last is None or step_of(folder) > step_of(last) or not is_whole(folder):
                discard(folder)
        self.best = best_of(run) or Best(run, -1, -math.inf)

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self._seconds

    def scored(self, model: AlignmentModel, step: int, scores: Mapping[str, float]) -> None:
        """Be told what the model scores after a step; weights better than all before are kept."""
        self._scored = step, scores
        if scores["r1"] > self.best.r1:
            self.best = Best(checkpoint_folder(self._run, step, "best"), step, scores["r1"])
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            self._waiting = weights, {**self._about, "step": step, "finished": False, "scores": dict(scores)}

    def save(self, model: AlignmentModel, step: int, stream: StreamState, optimizer: Optimizer | None) -> None:
        """Save a step's state, or with no optimiser that of a finished run; then remove what is not to be kept."""
        finished = optimizer is None
        if self._waiting is not None and not (finished and self.best.step == step):
            write_checkpoint(self.best.folder, *self._waiting, None)
        self._waiting = None
        scores = self._scored[1] if self._scored[0] == step else None
        about = {**self._about, "stream": stream}
        save_checkpoint(self._run, model, about, step=step, optimizer=optimizer, scores=scores)
        folders = checkpoint_folders(self._run)
        best = [folder for folder in checkpoint_folders(self._run, "best") if folder != self.best.folder]
        for folder in (*folders[: -self._keep], *best):
            discard(folder)
        if finished:  # nothing goes on from here
            for folder in folders[-self._keep :]:
                (folder / "optimizer.safetensors").unlink(missing_ok=True)
        self._saved = time.monotonic()


def best_of(run: Path) -> Best | None:
    """Return the best of a run's checkpoints, the first of several equals; None where none was scored."""
    scored = []
    for folder in (*checkpoint_folders(run, "best"), *checkpoint_folders(run)):
        saved = read_checkpoint(folder)
        if saved is not None and "r1" in (scores := saved.record.get("scores", {})):
            scored.append(Best(folder, step_of(folder), scores["r1"]))
    return max(scored, key=lambda each: (each.r1, -each.step), default=None)
