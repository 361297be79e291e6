"""Source kind `images`: a folder of images and its subfolders, with or without captions in text files beside them."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sail_align.extract.data import Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.sources.config import FilesConfig, SourceConfig
from sail_align.extract.sources.delimited import decode
from sail_align.extract.sources.file_set import Fence, require_utf8
from sail_align.extract.sources.images import FolderSource, ending_of, folders_below, list_folder
from sail_align.extract.system.files import open_regular

LONGEST_TEXT = 1 << 20
"""Bytes of a text file. A longer one is not a caption."""
TEXT = "txt"
_log = logging.getLogger(__name__)

Ending = Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")]


class ImagesConfig(FilesConfig, SourceConfig):
    """A folder of images, with those in its subfolders.

    `captions` maps a caption's name to the ending of the text files beside the images: with `{raw: txt}`, the caption
    of `dog.jpg` is in `dog.txt` or `dog.jpg.txt`. With a single ending, each line is a caption: `c0`, `c1`, …. Without
    `captions`, the `.txt` is the caption `raw` if there is any.
    """

    kind: Literal["images"]
    captions: Ending | dict[str, Ending] | None = None

    def open(self, data_root: Path) -> "ImagesSource":
        """Open the source."""
        return ImagesSource(self, data_root)


@dataclass(frozen=True)
class _Listing:
    """Content of one folder: its images, the text files by ending and image, and the other files."""

    images: list[str]
    texts: Mapping[str, Mapping[str, str]]
    others: list[str]


class ImagesSource(FolderSource):
    """Images of a folder and its subfolders, sorted by folder and name. Their key is their path in the folder.

    Hidden files and folders, and stores, are not looked at. A link to a folder is followed, unless it leads above.

    Raises:
        UserError: The folder is missing, or contains no image.
    """

    def __init__(self, config: ImagesConfig, data_root: Path):
        self._config = config
        self.folder = data_root / config.root
        self.fence = Fence(data_root)
        if not self.folder.is_dir():
            raise UserError(f"Folder {self.folder} is missing. Set --data-root or the manifest's 'root'.")
        if not any(self._list(folder).images for folder in folders_below(self.folder)):
            raise UserError(f"{self.folder} contains no images. Correct the manifest's 'root'.")

    @cached_property
    def caption_origins(self) -> str | dict[str, str]:  # type: ignore[override]  # looks for texts when first used
        """The manifest's `captions`. If it has none, the `.txt` files."""
        if self._config.captions is not None:
            return self._config.captions
        return {"raw": TEXT} if any(listing.texts[TEXT] for listing in self._folders.values()) else {}

    def parts(self) -> Sequence[Part]:
        """Return one part per folder. Its name depends on the names of the images, and the stamps of the texts."""
        return [
            Part(f"{folder} {self._digest(folder, listing)}", partial(self._read, folder, listing))
            for folder, listing in self._folders.items()
            if listing.images
        ]

    @property
    def left_out(self) -> Mapping[str, int]:
        """Files that are not images, and texts of an image that is not there."""
        names = (name for listing in self._folders.values() for name in listing.others)
        return dict(sorted(Counter(map(ending_of, names)).items()))

    @cached_property
    def _folders(self) -> dict[str, _Listing]:
        return {folder: self._list(folder) for folder in folders_below(self.folder)}

    def _list(self, folder: str) -> _Listing:
        origins = TEXT if self._config.captions is None else self._config.captions
        endings = (origins,) if isinstance(origins, str) else tuple(origins.values())
        images, others = list_folder(self.folder / folder, texts=tuple(f".{ending.lower()}" for ending in endings))
        require_utf8(self.folder / folder, images)
        texts = {ending: _texts(images, others, f".{ending}") for ending in endings}
        used = {name for found in texts.values() for name in found.values()}
        return _Listing(images, texts, [name for name in others if name not in used])

    def _digest(self, folder: str, listing: _Listing) -> str:
        digest = hashlib.sha256("\n".join(listing.images).encode())
        for ending in self._endings:
            for image, name in listing.texts[ending].items():
                status = (self.folder / folder / name).stat()
                digest.update(repr((image, name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    @property
    def _endings(self) -> list[str]:
        origins = self.caption_origins
        return [origins] if isinstance(origins, str) else list(origins.values())

    def _read(self, folder: str, listing: _Listing) -> Iterator[Sample]:
        origins = self.caption_origins
        for image in listing.images:
            texts = {ending: self._text(folder, listing.texts[ending].get(image)) for ending in self._endings}
            if isinstance(origins, str):
                lines = (line.strip() for line in texts[origins].split("\n"))
                captions = self.numbered([line for line in lines if line])
            else:
                captions = {name: texts[ending] for name, ending in origins.items() if texts[ending]}
            key = Path(folder, image).as_posix()
            yield Sample(key=key, image=key, captions=captions)

    def _text(self, folder: str, name: str | None) -> str:
        """Return the text of a file, "" if there is none."""
        if name is None:
            return ""
        path = self.folder / folder / name
        with open_regular(path) as file:
            content = file.read(LONGEST_TEXT + 1)
        if len(content) > LONGEST_TEXT:
            _log.warning("%s is left out: got more than %d bytes, expected a caption.", path, LONGEST_TEXT)
            return ""
        return decode(content).strip()


def _texts(images: Sequence[str], others: Sequence[str], ending: str) -> dict[str, str]:
    """Return the text file of each image that has one: `dog.txt` or `dog.jpg.txt`, in upper or lower case."""
    of_stem = {name[: -len(ending)]: name for name in others if name.lower().endswith(ending.lower())}
    found = {image: of_stem.get(os.path.splitext(image)[0]) or of_stem.get(image) for image in images}
    return {image: name for image, name in found.items() if name}
