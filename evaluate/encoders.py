"""The encoders of a run."""

from functools import cached_property
from typing import cast

from sail_align.align.checkpoint import Run
from sail_align.extract.encoders.base import Identity, TextEncoder, VisionEncoder
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.errors import UserError


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
