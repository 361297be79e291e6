"""Source kind `class-folder`: one sub-folder of images a class."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import ClassFolderSource as Description
from sail_align.extract.sources.base import Sample
from sail_align.extract.sources.images import read_image


class ClassFolderSource:
    """Images by class. Labels follow the sorted folder names, or the manifest's order where it lists `classes`.

    Raises:
        UserError: The folder or a listed class is missing, or there is no image.
    """

    captions = ()

    def __init__(self, description: Description, data_root: Path):
        self._root = data_root / description.root
        if not self._root.is_dir():
            raise UserError(f"Folder {self._root} is not there; set --data-root or the manifest's 'root'.")
        there = sorted(path.name for path in self._root.iterdir() if path.is_dir() and not path.name.startswith("."))
        names = description.classes or {folder: folder.replace("_", " ") for folder in there}
        for folder in names:
            if folder not in there:
                raise UserError(f"{self._root} has no folder {folder!r}, which the manifest lists under 'classes'.")
        self._folders = list(names)
        self.classes = tuple(names.values())
        if next(self.samples(), None) is None:
            raise UserError(f"No image under {self._root}; expected one sub-folder of images a class.")

    def samples(self) -> Iterator[Sample]:
        """Yield the images by class, and by name within a class. A key is `<folder>/<file>`."""
        endings = Image.registered_extensions()
        for label, folder in enumerate(self._folders):
            for path in sorted((self._root / folder).iterdir()):
                if path.suffix.lower() in endings and not path.name.startswith("."):
                    key = f"{folder}/{path.name}"
                    yield Sample(key=key, image=key, label=label)

    def image(self, location: str) -> Image.Image:
        """Open an image by `<folder>/<file>`."""
        return read_image(self._root / location)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Raise `UserError`: images by class have no masks."""
        raise UserError(f"A class-folder source has no masks ({location!r} asked for); use the kind 'table'.")
