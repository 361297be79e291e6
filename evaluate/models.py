"""The models that are scored: runs with their own encoders, and OpenCLIP models to compare them with.

RUNS/<model>/encoders.json   identities of both towers, so that scoring cached features loads neither
RUNS/<model>/settings.json   the model's name; scores.json and report.html are written beside it, as in a run
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.heads import Head
from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import read_json
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig, load_recorded
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import canonical_json, report_write_errors, write_atomically

PREFIX = "open_clip:"


class RunError(UserError):
    """A fault of the run, with which no other set could be scored either."""

    @classmethod
    def diverged(cls, run: Run) -> "RunError":
        """Return the error for embeddings that are not finite."""
        return cls(f"The heads of {run.path} return NaN or infinity. Its training has diverged.")


def load_open_clip(reference: str, device: str) -> Run:
    """Return an OpenCLIP model in the form of a run. Its scores go into a folder in `runs/` that is named after it.

    Args:
        reference: `open_clip:<model>@<weights>` or `open_clip:<folder>`.
        device: Device on which its towers are tried when it is scored for the first time.

    Raises:
        UserError: The reference is invalid, or the model cannot be loaded.
    """
    if not reference.startswith(PREFIX):
        raise UserError(f"--model {reference!r} is invalid: expected open_clip:<model>@<weights>.")
    path = Path(reference.removeprefix(PREFIX)).expanduser()
    name = path.resolve().name if path.is_dir() else path.name
    folder = Path("runs") / ("open_clip-" + re.sub(r"[^\w.-]+", "-", name))
    if not (folder / "settings.json").is_file():
        towers = {
            "image": ImageEncoderConfig(reference).load(device).identity.to_json(),
            "text": TextEncoderConfig(reference).load(device).identity.to_json(),
        }
        with report_write_errors(folder, has_out=False):
            write_atomically(folder / "encoders.json", json.dumps(towers, indent=1).encode())
            write_atomically(folder / "settings.json", json.dumps({"model": reference}, indent=1).encode())
    settings, towers = (read_json(folder / f"{name}.json", f"Remove {folder}.") for name in ("settings", "encoders"))
    if settings.get("model") != reference:
        raise UserError(f"{folder} exists and is of the model {settings.get('model')!r}. Rename that folder.")
    try:
        image, text = (Identity.from_json(towers.get(side, {})) for side in ("image", "text"))
    except ValueError as problem:
        raise UserError(f"{folder / 'encoders.json'} is invalid: {problem}. Remove {folder}.") from problem
    no_head = cast(Head, _NoHead())
    return Run(folder, AlignmentModel(no_head, no_head).eval(), image, text, settings, model_digest(image, text))


class _NoHead(nn.Identity):
    """The head of a model whose features are embeddings already, up to their length."""

    def of_patches(self, patches_BD: Tensor) -> Tensor:
        return patches_BD


def model_digest(image: Identity, text: Identity) -> str:
    """Return the digest that stands for the checkpoint in the scores of a model without heads."""
    return hashlib.sha256(canonical_json([image.spec.fingerprint, text.spec.fingerprint])).hexdigest()


class Encoders:
    """The encoders of a run, loaded when first used. A set that is encoded already needs neither.

    Args:
        run: The run. Its heads are moved to the device.
        device: `auto` is a GPU if there is one.
        allow_remote_code: Repositories that may run their own code, each as `owner/name@commit`.
    """

    def __init__(self, run: Run, device: str = "cpu", allow_remote_code: Sequence[str] = ()):
        self.run = run
        self.device = Runtime.of(device, "float32").device
        self._allow_remote_code = allow_remote_code
        run.model.to(self.device)

    @cached_property
    def image(self) -> VisionEncoder:
        """The image encoder that the run records. Any other is rejected."""
        return cast(VisionEncoder, self._load(self.run.image))

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder that the run records. Any other is rejected."""
        return cast(TextEncoder, self._load(self.run.text))

    def _load(self, recorded: Identity) -> VisionEncoder | TextEncoder:
        for each in recorded.singles:
            if "config" in each.spec.source and not each.location:
                raise RunError(
                    f"{self.run.path} was trained with the {each.spec.modality} encoder {each.spec.id} of a local "
                    "folder, which is not part of an export. Score the run itself."
                )
        try:
            return load_recorded(recorded, str(self.device), allow_remote_code=self._allow_remote_code)
        except UserError as problem:
            raise RunError(f"The encoder of {self.run.path} cannot be used: {problem}") from problem


def trained_on_demo(run: Run) -> bool:
    """Return whether a run was trained on the demo, by its stores. A store that is gone is recognised by its name."""
    for path in map(Path, run.settings.get("stores", [])):
        try:
            dataset = Store.open(path).dataset
        except UserError:
            dataset = path.stem
        if dataset == "demo":
            return True
    return False
