"""Source kind `webdataset`: tars of samples, as WebDataset and img2dataset write them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import Part, Sample, Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.schema import WebDatasetSource as Description
from sail_align.extract.sources.class_names import class_names
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.sources.images import read_image
from sail_align.extract.sources.tars import BLOCK, TarSamples, header_size, read_tar, table_beside

_log = logging.getLogger(__name__)


class WebDatasetSource(Source):
    """See `descriptions.WebDatasetSource` for the form.

    A sample's key is its tar's name without `.tar`, a slash, and its key there: many sets number each tar's samples
    from zero. Its location is `<tar>:<offset>:<size>`. Samples follow each other as their first members do. What is
    wrong with a tar is logged as a warning when it is read; its other samples are used.

    Raises:
        UserError: There are no tars or class names where the manifest says, or the first tar with samples has nothing
            of what the manifest says these hold.
    """

    def __init__(self, description: Description, data_root: Path):
        self._about = description
        self._files = FileSet(data_root / description.root)
        self._tars = self._files.find(description.files)
        self._classes = self._read_classes()
        captions = description.captions
        self._origins = {captions} if isinstance(captions, str) else {*captions.values()}
        self._origins |= {description.url, *([description.label] if self._classes else [])}

    @property
    def captions(self) -> tuple[str, ...]:
        """The names in the manifest, or c0 … for as many captions as any image has (all tars are read for it)."""
        if isinstance(self._about.captions, dict):
            return tuple(self._about.captions)
        return tuple(f"c{i}" for i in range(self._most_captions))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        return self._classes

    def parts(self) -> Sequence[Part]:
        """One part a tar, made from it and the table beside it."""
        return [Part(tar, partial(self._read, tar), self._local_files(tar)) for tar in self._tars]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Read an image's bytes out of its tar.

        Raises:
            UserError: The tar is gone, or holds something else there than when it was indexed.
        """
        if not location:
            raise UnreadableImageError(Status.MISSING, "the tar holds no image of this sample")
        tar, offset, size = location.rsplit(":", 2)
        start, stop = int(offset), int(offset) + int(size)
        data = self._files.read(tar, start - BLOCK, stop)
        if header_size(data[:BLOCK]) != int(size):
            raise UserError(f"{tar} is no longer what was indexed: no member of {size} bytes begins at byte {offset}.")
        if len(data) < BLOCK + int(size):
            raise UnreadableImageError(Status.UNDECODABLE, f"{location}: the tar is cut")
        return read_image(data[BLOCK:], location, least=least)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Raise `UserError`: samples in tars have no masks."""
        raise UserError(f"A webdataset source has no masks ({location!r} asked for); use the kind 'table'.")

    def _read(self, tar: str) -> Iterator[Sample]:
        found, samples = self._look_into(tar)
        notes = [*found.notes]
        if without := len(found.samples) - len(samples):
            notes.append(f"holds {without:,} keys with neither image nor caption, left out")
        for note in notes or ([] if samples else ["holds no sample"]):
            _log.warning("%s %s.", tar, note)
        if tar == self._tars[0]:
            self._require_content(tar, found, samples)
        yield from samples

    def _look_into(self, tar: str) -> tuple[TarSamples, list[Sample]]:
        found = read_tar(self._files, tar, self._about.images, self._origins)
        samples = [self._sample(tar, key, members) for key, members in found.samples.items()]
        return found, [sample for sample in samples if sample.image or sample.captions or sample.label >= 0]

    def _sample(self, tar: str, key: str, members: Mapping[str, Any]) -> Sample:
        key = f"{tar.removesuffix('.tar')}/{key}"
        image = next((members[ending] for ending in self._about.images if ending in members), None)
        captions = self._about.captions
        if isinstance(captions, str):
            value = members.get(captions)
            several = value if isinstance(value, list) else _text(value).split("\n")
            texts = [text for text in map(_text, several) if text]
            named = {f"c{i}": text for i, text in enumerate(texts)}
        else:
            if other := [origin for origin in captions.values() if isinstance(members.get(origin), (list, dict))]:
                raise UserError(f"{other[0]!r} of {key} is no text; if it is a list, write `captions: {other[0]}`.")
            named = {name: text for name, origin in captions.items() if (text := _text(members.get(origin)))}
        return Sample(
            key=key,
            image=f"{tar}:{image}" if image else "",
            captions=named,
            label=self._label(key, members.get(self._about.label)) if self._classes else -1,
            url=_text(members.get(self._about.url)),
        )

    def _label(self, key: str, value: object) -> int:
        if value is None:
            return -1
        number = _text(value)
        if not number.isdecimal() or int(number) >= len(self._classes):
            raise UserError(f"The label of {key} is {number!r}; the {len(self._classes)} classes count from 0.")
        return int(number)

    def _require_content(self, tar: str, found: TarSamples, samples: Sequence[Sample]) -> None:
        """Refuse a description that does not fit, before twelve million rows lack a caption.

        Where the first tar is empty or damaged, the next that has samples is looked at in its place.
        """
        others = iter(self._tars[1:])
        while not samples:
            if (another := next(others, None)) is None:
                return
            tar, (found, samples) = another, self._look_into(another)
        there = f"its members end in {', '.join(sorted(found.endings))}"
        if not any(sample.image for sample in samples):
            raise UserError(f"{tar} holds no {' or '.join(self._about.images)}; {there}: correct source.images.")
        captions = self._about.captions
        for name, origin in {"c0": captions}.items() if isinstance(captions, str) else captions.items():
            if not any(name in sample.captions for sample in samples):
                raise UserError(f"No sample of {tar} has a caption {origin!r}; {there}: correct source.captions.")

    def _read_classes(self) -> tuple[str, ...]:
        classes = self._about.classes
        if not isinstance(classes, str):
            return tuple(classes or ())
        if ":" in classes and "://" not in classes:
            return tuple(class_names(classes))
        with self._files.open(classes) as file:
            return tuple(line.strip() for line in file.read().decode("utf-8-sig").splitlines() if line.strip())

    def _local_files(self, tar: str) -> tuple[Path, ...]:
        paths = [self._files.local(name) for name in (tar, table_beside(tar))]
        return tuple(path for path in paths if path is not None and path.is_file())

    @cached_property
    def _most_captions(self) -> int:
        return max((len(sample.captions) for sample in self.samples()), default=0)


def _text(value: object) -> str:
    """Return a member's or a field's value as text, "" for nothing.

    JSON may hold halves of surrogate pairs, which no file can: they become U+FFFD, as invalid UTF-8 does.
    """
    if value is None:
        return ""
    return str(value).strip().encode("utf-8", "surrogatepass").decode("utf-8", "replace")
