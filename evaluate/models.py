"""Models that embed pictures and texts by themselves, scored like a run: rows to compare with.

RUNS/<model>/encoders.json   both towers' identities, so that scoring cached features loads neither
RUNS/<model>/settings.json   the model's name; scores.json and report.html come beside it, as in a run
"""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import cast

from torch import Tensor

from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.model.heads import Head
from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import read_json
from sail_align.extract.encoders.base import Identity, TextEncoder, VisionEncoder
from sail_align.extract.encoders.load import load_image_encoder, load_recorded, load_text_encoder
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import canonical_json, write_atomically

PREFIX = "open_clip:"


class NoHead(Head):
    """Features of a tower are embeddings already; only their length is still to be made 1."""

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the features."""
        return features_BD


def comparison(reference: str, *, device: str = "cpu", root: Path = Path("runs")) -> Run:
    """Return a model as if it were a run; its scores go into a folder under `root` that is named after it.

    Args:
        reference: `open_clip:<model>@<weights>` or `open_clip:<folder>`.
        device: Where its towers are tried when it is scored for the first time.
        root: The folder of runs.

    Raises:
        UserError: It is no such reference, or the model cannot be had.
    """
    if not reference.startswith(PREFIX):
        raise UserError(f"--model {reference!r} is none of OpenCLIP's; write open_clip:<model>@<weights>.")
    folder = root / _name(reference)
    if not (folder / "settings.json").is_file():
        towers = {
            "image": load_image_encoder(reference, device=device).identity.to_json(),
            "text": load_text_encoder(reference, device=device).identity.to_json(),
        }
        write_atomically(folder / "encoders.json", json.dumps(towers, indent=1).encode())
        write_atomically(folder / "settings.json", json.dumps({"model": reference}, indent=1).encode())
    settings, towers = (read_json(folder / f"{name}.json", f"remove {folder}") for name in ("settings", "encoders"))
    if settings.get("model") != reference:
        raise UserError(f"{folder} is there already, for {settings.get('model')!r}; rename that folder.")
    image, text = (Identity.from_json(towers[side]) for side in ("image", "text"))
    digest = hashlib.sha256(canonical_json([image.spec.fingerprint, text.spec.fingerprint])).hexdigest()
    heads = AlignmentModel(NoHead(image.spec.dim, 0.0), NoHead(text.spec.dim, 0.0))
    return Run(folder, heads.eval(), image, text, settings, digest)


def _name(reference: str) -> str:
    """Return a name for a model's folder: `open_clip-ViT-L-14-laion2b_s32b_b82k`."""
    path = Path(reference.removeprefix(PREFIX)).expanduser()
    named = path.resolve().name if path.is_dir() else path.name
    return "open_clip-" + re.sub(r"[^\w.-]+", "-", named)


class RunError(UserError):
    """The fault is the run's: no other set could be scored with it either."""


class Encoders:
    """A run's own encoders, loaded when first used: a set that is encoded already needs neither.

    The run's heads go to the same device; `auto` is a GPU if there is one.
    """

    def __init__(self, run: Run, device: str = "cpu"):
        self.run = run
        self.device = Runtime.of(device, "float32").device
        run.model.to(self.device)

    @cached_property
    def image(self) -> VisionEncoder:
        """The image encoder that the run records; another one is refused."""
        return cast(VisionEncoder, self._load(self.run.image))

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder that the run records; another one is refused."""
        return cast(TextEncoder, self._load(self.run.text))

    def _load(self, recorded: Identity) -> VisionEncoder | TextEncoder:
        if "config" in recorded.spec.source and not recorded.location:
            raise RunError(
                f"{self.run.path} was trained with the {recorded.spec.modality} encoder {recorded.spec.id} of a local "
                "folder, which an export leaves behind; score the run itself."
            )
        try:
            return load_recorded(recorded, device=str(self.device))
        except UserError as problem:
            raise RunError(f"The encoder of {self.run.path} cannot be used: {problem}") from problem


def saw_the_demo(run: Run) -> bool:
    """Whether a run was trained on the demo's drawings, by its stores; one that is gone is known by its name."""
    return any(_dataset(Path(path)) == "demo" for path in run.settings.get("stores", []))


def _dataset(store: Path) -> str:
    try:
        return Store.open(store).dataset
    except UserError:
        return store.stem
