"""Checkpoints of a run: tensors in safetensors, everything else in JSON.

RUN/settings.json                     what decides the weights; written when the run is created
RUN/metrics.jsonl                     one JSON object per line
RUN/finished.json                     digest of the finished log; written last
RUN/checkpoints/step-00001200/        the state to resume from, or the result of a finished run
    model.safetensors                 weights, τ and b
    optimizer.safetensors             state of the optimiser; removed once the run is finished
    model.json                        settings, architecture, encoders, step, position in the stream, digest of the log,
                                      held-out scores, and the digest of all that; written last: it marks a complete
                                      checkpoint
RUN/checkpoints/best-00001100/        the weights with the best scores, if they are not the last; no optimiser state.
                                      These are the weights that a run stands for.

The learning rate and random numbers of a step depend only on the settings and its number, so they are not saved.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_args

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from sail_align.align.model.alignment import AlignmentModel, Architecture
from sail_align.align.runs.folder import (
    BEGIN_AGAIN,
    RunFolder,
    RunSettings,
    damaged,
    quality,
    read_file,
    read_json,
    record_digest,
)
from sail_align.align.runs.tensors import save_tensors
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.validation import validated

FORMAT = 2

Tensors = Mapping[str, Tensor]

Choice = Literal["best", "last"]
"""Weights of a run: those with the best scores on held-out pairs, or those after the last step."""


class _Progress(TypedDict):
    """The fields that every reader of a checkpoint needs."""

    step: Annotated[int, Field(ge=0)]
    finished: bool
    scores: NotRequired[dict[str, float]]


class _Form(TypedDict):
    """The fields of a checkpoint and of an export. Architecture and encoders have checks of their own."""

    architecture: dict[str, Any]
    image: dict[str, Any]
    text: dict[str, Any]
    settings: RunSettings
    step: Annotated[int, Field(ge=0)]
    finished: bool


@dataclass(frozen=True)
class Run:
    """A run's model in evaluation mode, and the encoders whose features it takes.

    Attributes:
        path: Folder of the run, of a checkpoint, or of an export.
        model: The heads, τ and b, on the CPU.
        image: Identity of the image encoder.
        text: Identity of the text encoder.
        settings: Everything that decided the weights, including the stores' digests.
        digest: SHA-256 over weights, settings and encoders, as recorded in score files.
        step: Number of steps done.
        finished: Whether training has ended, with these weights or with later ones.
        architecture: Arguments of `Architecture`.
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
    """A checkpoint's folder and its record, the content of model.json; `remedy` ends messages about damaged files."""

    folder: Path
    record: dict[str, Any]
    remedy: str

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.record["step"])

    @property
    def finished(self) -> bool:
        """Whether the run ended with it."""
        return bool(self.record["finished"])

    @property
    def scores(self) -> dict[str, float]:
        """Scores on held-out pairs. Empty if it was not scored."""
        return dict(self.record.get("scores", {}))

    @classmethod
    def read(cls, path: Path) -> "Checkpoint | None":
        """Read a checkpoint, or the last one of a run; return None if the run has none yet.

        Raises:
            UserError: It has another format, or is damaged.
        """
        is_run = not RunFolder(path).is_checkpoint
        finished = RunFolder(path).finished if is_run else None  # first: a fit may end between these lines
        folder = RunFolder(path).last if is_run else path
        if finished and (folder is None or RunFolder(folder).step != finished["step"]):
            raise damaged(RunFolder(path).checkpoint(finished["step"]) / "model.json", BEGIN_AGAIN)
        if folder is None:
            return None
        resume = f"Restore it, or remove {folder} to resume from the checkpoint before."
        remedy = BEGIN_AGAIN if finished else resume
        record = read_json(folder / "model.json", remedy)
        if record.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{folder} has format {record['format']!r}, this version reads {FORMAT}. Update sail-align."
            )
        if record.get("digest") != record_digest(record):
            raise damaged(folder / "model.json", remedy)
        checkpoint = cls(folder, record, remedy)
        try:
            validated(_Progress, record)
        except ValueError as problem:
            raise checkpoint._invalid(str(problem)) from problem
        return checkpoint

    @classmethod
    def best(cls, run: Path) -> "Checkpoint | None":
        """Return the checkpoint with the highest `quality`, the first of equal ones; None if none was scored."""
        folders = [*RunFolder(run).checkpoints("best"), *RunFolder(run).checkpoints()]
        found = [saved for folder in folders if (saved := cls.read(folder))]
        scored = [(value, -each.step, each) for each in found if (value := quality(each.scores)) is not None]
        return max(scored, key=lambda each: each[:2])[-1] if scored else None

    @classmethod
    def choose(cls, path: Path, which: Choice = "best") -> "tuple[Checkpoint, bool] | None":
        """Return the checkpoint that a path stands for, and whether training has ended; None if a run has none yet.

        Args:
            path: A checkpoint, or a run.
            which: The weights of a run. The best ones are the last if no pairs were held out.
        """
        last = cls.read(path)
        if last is None:
            return None
        is_run = not RunFolder(path).is_checkpoint
        best = cls.best(path) if is_run and which == "best" else None
        return best or last, last.finished

    @staticmethod
    def write(
        folder: Path,
        weights: Tensors,
        about: Mapping[str, Any],
        *,
        step: int,
        finished: bool = True,
        scores: Mapping[str, float] | None = None,
        optimizer: Tensors | None = None,
    ) -> None:
        """Write a checkpoint, replacing one in the same folder. A process killed at any point leaves no incomplete one.

        Args:
            folder: Folder of the checkpoint.
            weights: State of the model.
            about: JSON-able data: `architecture`, `image` and `text` (identities of the encoders), `settings`, and for
                a resumable checkpoint `stream`, the position in the stream.
            step: Number of steps done.
            finished: Whether those are all steps.
            scores: Scores of the model on held-out pairs, if it was scored at this step.
            optimizer: Result of `optimizer_state`, to resume from.
        """
        RunFolder(folder).discard()
        content = save_tensors(weights)
        record = {"format": FORMAT, **about, "step": step, "finished": finished, "scores": dict(scores or {})}
        record["weights_sha256"] = hashlib.sha256(content).hexdigest()
        write_atomically(folder / "model.safetensors", content)
        if optimizer is not None:
            state = save_tensors(optimizer)
            record["optimizer_sha256"] = hashlib.sha256(state).hexdigest()
            write_atomically(folder / "optimizer.safetensors", state)
        record["digest"] = record_digest(record)
        write_atomically(folder / "model.json", json.dumps(record, indent=1, ensure_ascii=False).encode())

    @staticmethod
    def optimizer_state(model: AlignmentModel, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the tensors of an optimiser's state, named by parameter and slot."""
        return {
            f"{name}/{slot}": value.cpu().contiguous()
            for name, parameter in model.named_parameters()
            for slot, value in optimizer.state.get(parameter, {}).items()
        }

    def restore(self, model: AlignmentModel, optimizer: Optimizer | None = None) -> None:
        """Load the weights into a model, and the optimiser's state into an optimiser.

        Raises:
            UserError: A file is damaged, or its tensors do not fit the model; the message names the first that differs.
        """
        saved = self._read_tensors("model", "weights_sha256")
        self._require_fit(saved, model.state_dict())
        model.load_state_dict(saved)
        if optimizer is not None:
            parameters = dict(model.named_parameters())
            state = self._read_tensors("optimizer", "optimizer_sha256")
            for name, tensor in state.items():
                key, _, slot = name.rpartition("/")
                if key not in parameters or (slot != "step" and tensor.shape != parameters[key].shape):
                    raise damaged(self.folder / "optimizer.safetensors", self.remedy)
                parameter = parameters[key]
                # torch's optimisers keep their step counter on the CPU.
                optimizer.state[parameter][slot] = tensor if slot == "step" else tensor.to(parameter.device)

    def _require_fit(self, saved: Tensors, expected: Tensors) -> None:
        """Raise `UserError` unless the tensors of a file are those of a model, by name, shape and type."""
        for name in (*expected, *saved):
            found = [_form_of(tensors[name]) if name in tensors else "missing" for tensors in (saved, expected)]
            if found[0] != found[1]:
                raise UserError(
                    f"{self.folder} does not fit this model: {name} is {found[0]} in the file and {found[1]} in the "
                    "model."
                )

    def check_finished(self, run: Path) -> None:
        """Check the weights and the log of a finished run, whose last checkpoint this is.

        Raises:
            UserError: One of them is missing or damaged.
        """
        self._read_tensors("model", "weights_sha256")
        folder = RunFolder(run)
        folder.read_log(self.step)
        finished = folder.finished
        if finished and finished["metrics_sha256"] != folder.metrics_digest():
            raise damaged(folder.metrics, BEGIN_AGAIN)

    def load(self, path: Path, digest: str) -> Run:
        """Load the model on the CPU, as a run with this path and digest. Raises `UserError` like `restore`."""
        form, architecture, image, text = self._parse()
        with torch.device("meta"):  # no memory is taken before the sizes are known to be those of the weights
            expected = architecture.build().state_dict()
        saved = self._read_tensors("model", "weights_sha256")
        self._require_fit(saved, expected)
        model = architecture.build()
        model.load_state_dict(saved)
        for name, side in (("image", image), ("text", text)):
            takes = getattr(architecture, f"{name}_dim")
            if side.spec.dim != takes:
                raise self._invalid(f"the {name} head takes {takes} features, its encoder has {side.spec.dim}")
        about: dict[str, Any] = {name: form[name] for name in ("step", "finished", "architecture")}
        return Run(path, model.eval(), image, text, digest=digest, settings=self.record["settings"], **about)

    def _parse(self) -> tuple[_Form, Architecture, Identity, Identity]:
        """Return the record, its architecture and its encoders, checked: digests do not show who wrote them."""
        place = ""
        try:
            form = validated(_Form, self.record)
            place = "architecture: "
            architecture = Architecture.from_json(form["architecture"])
            place = "image: "
            image = Identity.from_json(form["image"])
            place = "text: "
            return form, architecture, image, Identity.from_json(form["text"])
        except ValueError as problem:
            raise self._invalid(f"{place}{problem}") from problem

    def _invalid(self, reason: str) -> UserError:
        return UserError(f"The record in {self.folder} is invalid: {reason}. {self.remedy}")

    def _read_tensors(self, name: str, digest: str) -> dict[str, Tensor]:
        file = self.folder / f"{name}.safetensors"
        content = read_file(file, self.remedy)
        if hashlib.sha256(content).hexdigest() != self.record.get(digest):
            raise damaged(file, self.remedy)
        try:
            return load(content)
        except (SafetensorError, ValueError, KeyError) as problem:  # the digest is that of the damaged content
            raise damaged(file, self.remedy) from problem


def _form_of(tensor: Tensor) -> str:
    kind = "" if tensor.dtype == torch.float32 else f" and type {str(tensor.dtype).removeprefix('torch.')}"
    return f"of shape {tuple(tensor.shape)}{kind}"


def load_run(path: str | Path, which: Choice = "best") -> Run:
    """Load the model of a run, or of one of its checkpoints, on the CPU.

    Args:
        path: Folder of the run or of the checkpoint.
        which: The weights of a run. The best ones are the last if no pairs were held out.

    Raises:
        UserError: The path is neither, the run has no checkpoint yet, or it is damaged or has another format.
    """
    path = Path(path)
    RunFolder(path).require()
    while (chosen := Checkpoint.choose(path, which)) is not None:
        checkpoint, ended = chosen
        try:
            return replace(checkpoint.load(path, checkpoint.record["digest"]), finished=ended)
        except UserError:
            if RunFolder(checkpoint.folder).is_checkpoint or RunFolder(path).is_checkpoint:
                raise  # otherwise a fit has replaced the best weights between these lines
    raise UserError(f"{path} has no checkpoint yet. Wait until its `sail-align fit` has saved one.")


def checkpoint_path(run: Path, which: str | None) -> Path:
    """Return the folder with the chosen weights of a run: the run, which stands for the best, or the last checkpoint.

    Args:
        run: Folder of the run. A checkpoint or an export leaves no choice.
        which: "best", "last" or None for the default.

    Raises:
        UserError: The choice is invalid, or there is none.
    """
    if which is None:
        return run
    if which not in get_args(Choice):
        raise UserError(f"--checkpoint is invalid: got {which!r}, expected best or last.")
    if not RunFolder(run).is_run:
        if not RunFolder(run).is_export:
            RunFolder(run).require()
        kind = "an export" if RunFolder(run).is_export else "a checkpoint"
        raise UserError(f"--checkpoint {which} is for runs, and {run} is {kind}. Leave it out.")
    best, last = Checkpoint.best(run), RunFolder(run).last
    return last if which == "last" and last and best and best.folder != last else run
