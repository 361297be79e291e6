"""Source kind `mask-folder`: images and semantic masks of the same names, the form of ADE20K, VOC and COCO-Stuff."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sail_align.extract.data import IGNORED, Part, Sample, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.sources.class_names import label_names
from sail_align.extract.sources.config import FilesConfig, NonEmpty, SourceConfig
from sail_align.extract.sources.file_set import Fence, require_utf8
from sail_align.extract.sources.images import FolderSource, ending_of, list_folder
from sail_align.extract.system.files import open_regular

MaskValue = Annotated[int, Field(ge=0, le=255)]

Names = dict[str, list[str]]
"""Names of files by the name without ending."""

NO_CLASS = -1
PROBED_MASKS = 16
"""Number of masks that are read when the source is opened. A single mask may contain only values that are valid in both
numberings."""


class MaskFolderConfig(FilesConfig, SourceConfig):
    """A folder of images and one of masks (PNGs of one channel or a palette) with the same names.

    `names` is a file that lists the images to use, one name without ending per line. Without it, all images that have a
    mask are used. `classes` maps labels to names, or names a packaged table of them (`ade20k-150`). A mask holds
    label − `label_offset`. Pixels whose value is in `ignored` belong to no class. Any other value is an error, because
    it means that the masks do not match the manifest.
    """

    kind: Literal["mask-folder"]
    images: str
    masks: str
    names: str | None = None
    classes: dict[MaskValue, str] | NonEmpty
    label_offset: int = 0
    ignored: list[MaskValue] = Field(default=[])

    @property
    def needs(self) -> list[str]:
        """The folders of images and masks, and the list of names."""
        return [self.images, self.masks, *([self.names] if self.names else [])]

    def open(self, data_root: Path) -> "MaskFolderSource":
        """Open the source."""
        return MaskFolderSource(self, data_root)


class MaskFolderSource(FolderSource):
    """Images with masks, sorted or in the order of the list of names. Keys and locations are file names.

    Some masks are read when the source is opened, so that masks with another numbering are rejected before anything is
    encoded.

    Raises:
        UserError: A folder or the list is missing, a listed image or mask is missing, no mask can hold the label of a
            class, or a probed mask is not of the described form.
    """

    def __init__(self, config: MaskFolderConfig, data_root: Path):
        root = data_root / config.root
        self.folder, self._masks = root / config.images, root / config.masks
        self.fence = Fence(data_root)
        self._list = root / config.names if config.names else None
        for path in (self.folder, self._masks, self._list):
            if path and not path.exists():
                raise UserError(f"{path} is missing. Correct the manifest's source or set --data-root.")
        self._classes = label_names(config.classes) if isinstance(config.classes, str) else config.classes
        self.classes = tuple(self._classes.values())
        self._offset = config.label_offset
        self._index = np.full(256, NO_CLASS, dtype=np.int16)
        self._index[config.ignored] = IGNORED
        for index, (label, name) in enumerate(self._classes.items()):
            value = label - self._offset
            if not 0 <= value <= 255 or value in config.ignored:
                raise UserError(
                    f"Class {name!r} is invalid: its mask value would be {value} (label {label}), expected 0 to 255 "
                    "and not ignored. Correct 'classes', 'label_offset' or 'ignored'."
                )
            self._index[value] = index
        probed = np.linspace(0, len(self._samples) - 1, PROBED_MASKS).astype(int)
        for row in sorted(set(probed.tolist())):
            try:
                self.mask(self._samples[row].mask)
            except UnreadableImageError as problem:
                raise UserError(f"A mask cannot be read: {problem}. Restore it.") from problem

    def parts(self) -> Sequence[Part]:
        """Return one part, the list of names or the folder of masks."""
        return [Part("masks", lambda: iter(self._samples), (self._list or self._masks,))]

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a mask as class indices, (H, W).

        Raises:
            UserError: A value is neither a class nor ignored.
        """
        values = self.read_mask(self.fence.path(self._masks, location))
        indices = self._index[values]
        unknown = values[indices == NO_CLASS]
        if unknown.size:
            raise UserError(
                f"Mask {self._masks / location} contains the value {unknown[0]}, which is neither a class nor ignored. "
                f"Correct 'classes', 'label_offset' and 'ignored' in the manifest{self._suggest_numbering(values)}."
            )
        return indices.astype(np.uint8)

    def _suggest_numbering(self, values: NDArray[np.uint8]) -> str:
        """Suggest the label offset that would fit a rejected mask, if one of the two common ones does."""
        for offset, unlabelled in ((0, 0), (1, 255)):
            known = {*(label - offset for label in self._classes), unlabelled}
            if offset != self._offset and {*np.unique(values).tolist()} <= known:
                return f" (label_offset: {offset} with ignored: [{unlabelled}] fits this mask)"
        return ""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Images without a mask and other files, unless a list names the images to use."""
        return {} if self._list else self._files[2]

    @cached_property
    def _files(self) -> tuple[Names, Names, dict[str, int]]:
        """Names of images and of masks by stem, and numbers of files that are neither.

        In a folder of both, PNGs are masks.
        """
        pictures, others = list_folder(self.folder)
        masks, no_masks = list_folder(self._masks)
        pngs = [name for name in masks if name.lower().endswith(".png")]
        if self.folder.samefile(self._masks):
            pictures, no_masks, masks = sorted({*pictures} - {*pngs}), [], pngs
        no_masks += sorted({*masks} - {*pngs})
        require_utf8(self.folder, pictures)
        require_utf8(self._masks, pngs)
        image_names, mask_names = _by_stem(pictures), _by_stem(pngs)
        left_out = Counter(map(ending_of, [*others, *no_masks]))
        if without := sum(len(found) for stem, found in image_names.items() if stem not in mask_names):
            left_out["images without a mask"] = without
        return image_names, mask_names, dict(sorted(left_out.items()))

    @cached_property
    def _samples(self) -> list[Sample]:
        images, masks, _ = self._files
        names = self._read_names(self._list) if self._list else sorted(masks)
        for name in names:
            for folder, found in ((self.folder, images.get(name, [])), (self._masks, masks.get(name, []))):
                if not found:
                    raise UserError(f"{folder} has no picture {name!r}. The data set is incomplete.")
                if len(found) > 1:
                    raise UserError(f"{folder} has several pictures {name!r}: {', '.join(found)}. Keep one of them.")
        if not names:
            raise UserError(f"{self._masks} contains no masks. Expected PNGs with the names of the images.")
        return [Sample(key=images[name][0], image=images[name][0], mask=masks[name][0]) for name in names]

    @staticmethod
    def _read_names(path: Path) -> list[str]:
        try:
            with open_regular(path) as file:
                lines = file.read().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"{path} cannot be read ({problem}). Expected one name per line.") from problem
        return [line.strip() for line in lines if line.strip()]


def _by_stem(names: list[str]) -> Names:
    by_stem: Names = {}
    for name in names:
        by_stem.setdefault(Path(name).stem, []).append(name)
    return by_stem
