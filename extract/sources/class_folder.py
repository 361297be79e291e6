"""Source kind `class-folder`: one sub-folder of images a class."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import UserError
from sail_align.extract.schema import ClassFolderSource as Description
from sail_align.extract.sources.class_names import names_of_folders
from sail_align.extract.sources.images import read_image_in


class ClassFolderSource(Source):
    """Images by class. Labels follow the sorted folder names, or the manifest's order where it lists `classes`.

    Raises:
        UserError: The folder or a listed class is missing, a published list of names is not there or of another length,
            or a folder that is to be a class holds no image.
    """

    def __init__(self, description: Description, data_root: Path):
        self._root = data_root / description.root
        if not self._root.is_dir():
            raise UserError(f"Folder {self._root} is not there; set --data-root or the manifest's 'root'.")
        there = sorted(path.name for path in self._root.iterdir() if path.is_dir() and not path.name.startswith("."))
        names = self._named(description.classes, there)
        for folder in names:
            if folder not in there:
                raise UserError(f"{self._root} has no folder {folder!r}, which the manifest lists under 'classes'.")
        self._names = names
        if next(self.samples(), None) is None:
            raise UserError(f"No image under {self._root}; expected one sub-folder of images a class.")

    @property
    def captions(self) -> tuple[str, ...]:
        """None: images by class have labels."""
        return ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders, or those that the manifest gives them."""
        return tuple(self._names.values())

    def parts(self) -> Sequence[Part]:
        """One part a class; its images follow by name, with `<folder>/<file>` for a key."""
        return [
            Part(folder, partial(self._images, label, folder), (self._root / folder,))
            for label, folder in enumerate(self._names)
        ]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image by `<folder>/<file>`."""
        return read_image_in(self._root, location, least=least)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Raise `UserError`: images by class have no masks."""
        raise UserError(f"A class-folder source has no masks ({location!r} asked for); use the kind 'table'.")

    def _named(self, classes: dict[str, str] | str | None, there: list[str]) -> dict[str, str]:
        """Return the names of the folders, in label order."""
        if not classes:
            for folder in there:
                self._require_image(folder)
            return {folder: folder.replace("_", " ") for folder in there}
        if not isinstance(classes, str):
            return classes
        try:
            return names_of_folders(classes, there)
        except UserError as problem:
            raise UserError(f"{self._root}: {problem}") from problem

    def _require_image(self, folder: str) -> None:
        """Refuse a folder that is no class, such as one of features: it would change the labels of those after it."""
        if next(self._images(0, folder), None) is None:
            raise UserError(
                f"Folder {self._root / folder} holds no image, so it is no class; move it, or list the classes in the "
                "manifest."
            )

    def _images(self, label: int, folder: str) -> Iterator[Sample]:
        endings = Image.registered_extensions()
        for path in sorted((self._root / folder).iterdir()):
            if path.suffix.lower() in endings and not path.name.startswith("."):
                key = f"{folder}/{path.name}"
                yield Sample(key=key, image=key, label=label)
