"""What sources have in common whose samples one file of annotations lists, beside a folder of images."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.errors import UserError
from sail_align.extract.sources.base import Part, Sample, Source
from sail_align.extract.sources.images import read_image_in


class AnnotatedImages(Source):
    """Images in a folder, listed with their captions in a file that is read as a whole.

    Keys and locations are paths under the folder of images.

    Raises:
        UserError: The file or the folder is missing, or the file is not of the published form.
    """

    def __init__(self, annotations: Path, images: Path):
        for path in (annotations, images):
            if not path.exists():
                raise UserError(f"{path} is not there; correct the manifest's source or set --data-root.")
        self._annotations = annotations
        self._images = images

    @abstractmethod
    def _read(self) -> list[Sample]:
        """Return the samples; a field that is missing or of another form raises KeyError, TypeError or ValueError."""

    @cached_property
    def _samples(self) -> list[Sample]:
        try:
            samples = self._read()
        except (KeyError, TypeError, ValueError) as problem:
            reason = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            raise UserError(f"{self._annotations} is not of the published form ({reason}).") from problem
        if not samples:
            raise UserError(f"{self._annotations} gives no sample; correct the manifest's source.")
        return samples

    @property
    def captions(self) -> tuple[str, ...]:
        """c0, c1, … for as many captions as any image has."""
        return tuple(f"c{i}" for i in range(max(len(sample.captions) for sample in self._samples)))

    @property
    def classes(self) -> tuple[str, ...]:
        """None, unless the annotations sort the samples into kinds."""
        return ()

    def parts(self) -> Sequence[Part]:
        """One part: the file of annotations."""
        return [Part(self._annotations.name, lambda: iter(self._samples), (self._annotations,))]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image by its path under the folder of images."""
        return read_image_in(self._images, location, least=least)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Raise `UserError`: these sources have captions, not masks."""
        raise UserError(f"{self._annotations} comes without masks ({location!r} asked for); use 'mask-folder'.")


def numbered(texts: Sequence[str]) -> dict[str, str]:
    """Return captions by name, c0, c1, …; an empty one keeps its number and is left out."""
    return {f"c{i}": text for i, text in enumerate(texts) if text}


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}.") from problem
