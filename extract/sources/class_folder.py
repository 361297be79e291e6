"""Source kind `class-folder`: one subfolder of images per class."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image

from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import UserError
from sail_align.extract.sources.class_names import names_of_folders
from sail_align.extract.sources.config import FilesConfig, NonEmpty, SourceConfig
from sail_align.extract.sources.images import read_image_in


class ClassFolderConfig(FilesConfig, SourceConfig):
    """A folder with one subfolder of images per class.

    `classes` renames folders, in label order, or names a published list of class names such as `open_clip:imagenet`. A
    list fits folders that are named by ImageNet's WordNet ids (all or some of them) or by class numbers. Otherwise the
    list must have as many names as there are folders, which are then taken in sorted order.
    """

    kind: Literal["class-folder"]
    classes: dict[str, str] | NonEmpty | None = None

    @property
    def needs(self) -> list[str]:
        """At least one subfolder."""
        return ["*/"]

    def open(self, data_root: Path) -> "ClassFolderSource":
        """Open the source."""
        return ClassFolderSource(self, data_root)


class ClassFolderSource(Source):
    """Images by class. Labels follow the sorted folder names, or the manifest's order if it lists `classes`.

    Raises:
        UserError: The folder or a listed class is missing, a published list of names is unknown or has another length,
            or the folder of a class contains no image.
    """

    def __init__(self, config: ClassFolderConfig, data_root: Path):
        self._root = data_root / config.root
        if not self._root.is_dir():
            raise UserError(f"Folder {self._root} is missing. Set --data-root or the manifest's 'root'.")
        folders = sorted(path.name for path in self._root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self._names = self._name_folders(config.classes, folders)
        for folder in self._names:
            if folder not in folders:
                raise UserError(f"{self._root} has no folder {folder!r}, which the manifest lists under 'classes'.")
        if next(self.samples(), None) is None:
            raise UserError(f"{self._root} contains no images. Expected one subfolder of images per class.")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders, or those that the manifest gives them."""
        return tuple(self._names.values())

    def parts(self) -> Sequence[Part]:
        """Return one part per class. Its images are sorted by name; their key is `<folder>/<file>`."""
        return [
            Part(folder, partial(self._read, label, folder), (self._root / folder,))
            for label, folder in enumerate(self._names)
        ]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image by `<folder>/<file>`."""
        return read_image_in(self._root, location, least=least)

    def _name_folders(self, classes: dict[str, str] | str | None, folders: list[str]) -> dict[str, str]:
        """Return the class names by folder, in label order."""
        if isinstance(classes, str):
            try:
                return names_of_folders(classes, folders)
            except UserError as problem:
                raise UserError(f"{self._root}: {problem}") from problem
        if classes:
            return classes
        for folder in folders:  # a folder of other files, such as features, would shift the labels after it
            if next(self._read(0, folder), None) is None:
                raise UserError(
                    f"Folder {self._root / folder} contains no images. Move it, or list the classes in the manifest."
                )
        return {folder: folder.replace("_", " ") for folder in folders}

    def _read(self, label: int, folder: str) -> Iterator[Sample]:
        endings = Image.registered_extensions()
        for path in sorted((self._root / folder).iterdir()):
            if path.suffix.lower() in endings and not path.name.startswith("."):
                key = f"{folder}/{path.name}"
                yield Sample(key=key, image=key, label=label)
