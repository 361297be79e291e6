"""Source kind `class-folder`: one subfolder of images per class."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

from sail_align.extract.data import Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.sources.class_names import class_names
from sail_align.extract.sources.config import FilesConfig, NonEmpty, SourceConfig
from sail_align.extract.sources.file_set import Fence, require_utf8
from sail_align.extract.sources.images import FolderSource, ending_of, is_folder, list_folder


def imagenet_ids() -> list[str]:
    """Return the WordNet ids of ImageNet-1k's classes in label order, which is their sorted order."""
    file = resources.files("sail_align.data_manifests") / "classes" / "imagenet-wordnet-ids.txt"
    return file.read_text(encoding="utf-8").split()


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


class ClassFolderSource(FolderSource):
    """Images by class. Labels follow the sorted folder names, or the manifest's order if it lists `classes`.

    Raises:
        UserError: The folder or a listed class is missing, a published list of names is unknown or has another length,
            or the folder of a class contains no image.
    """

    def __init__(self, config: ClassFolderConfig, data_root: Path):
        self.folder = data_root / config.root
        self.fence = Fence(data_root)
        if not self.folder.is_dir():
            raise UserError(f"Folder {self.folder} is missing. Set --data-root or the manifest's 'root'.")
        folders = sorted(path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        require_utf8(self.folder, folders)
        self._names = self._name_folders(config.classes, folders)
        self.classes = tuple(self._names.values())
        for folder in self._names:
            if folder not in folders:
                raise UserError(f"{self.folder} has no folder {folder!r}, which the manifest lists under 'classes'.")
        if next(self.samples(), None) is None:
            raise UserError(f"{self.folder} contains no images. Expected one subfolder of images per class.")

    def parts(self) -> Sequence[Part]:
        """Return one part per class. Its images are sorted by name; their key is `<folder>/<file>`."""
        return [
            Part(folder, partial(self._read, label, folder), (self.folder / folder,))
            for label, folder in enumerate(self._names)
        ]

    def _name_folders(self, classes: dict[str, str] | str | None, folders: list[str]) -> dict[str, str]:
        """Return the class names by folder, in label order."""
        if isinstance(classes, str):
            try:
                return self._published_names(classes, folders)
            except UserError as problem:
                raise UserError(f"{self.folder}: {problem}") from problem
        if classes:
            return classes
        for folder in folders:  # a folder of other files, such as features, would shift the labels after it
            if next(self._read(0, folder), None) is None:
                raise UserError(
                    f"Folder {self.folder / folder} contains no images. Move it, or list the classes in the manifest."
                )
        return {folder: folder.replace("_", " ") for folder in folders}

    @staticmethod
    def _published_names(reference: str, folders: list[str]) -> dict[str, str]:
        """Return the class names of folders from a published list, in label order.

        Folders may be named by WordNet ids, by all or some of ImageNet's 1,000 (ImageNet-A and -R have 200), or by
        class numbers (ImageNet-V2, where 10 sorts before 2). Otherwise the sorted folders correspond to the names in
        order.

        Raises:
            UserError: The list does not exist, or has another number of names than there are folders.
        """
        names = class_names(reference)
        ids = imagenet_ids() if reference == "open_clip:imagenet" else []
        for known in (ids, [str(number) for number in range(len(names))]):
            if folders and set(folders) <= set(known):
                return {folder: names[label] for label, folder in enumerate(known) if folder in set(folders)}
        if len(names) != len(folders):
            hint = " They are neither all numbers nor all WordNet ids of ImageNet." if ids else ""
            raise UserError(f"Got {len(folders)} folders, but {reference} names {len(names)} classes.{hint}")
        return dict(zip(folders, names, strict=True))

    @property
    def left_out(self) -> Mapping[str, int]:
        """Files in the folders of the classes that are not images, and images beside and below these folders."""
        counts = Counter(f"{ending_of(name)} outside the class folders" for name in list_folder(self.folder)[0])
        for folder in self._names:
            counts.update(map(ending_of, list_folder(self.folder / folder)[1]))
            with os.scandir(self.folder / folder) as entries:
                below = [entry.path for entry in entries if is_folder(entry) and not entry.name.startswith(".")]
            for where, _, _ in (walked for path in below for walked in os.walk(path)):
                if "/." not in where.removeprefix(str(self.folder / folder)):
                    counts.update(f"{ending_of(name)} in subfolders" for name in list_folder(Path(where))[0])
        return dict(sorted(counts.items()))

    def _read(self, label: int, folder: str) -> Iterator[Sample]:
        names = list_folder(self.folder / folder)[0]
        require_utf8(self.folder / folder, names)
        for name in names:
            key = f"{folder}/{name}"
            yield Sample(key=key, image=key, label=label)
