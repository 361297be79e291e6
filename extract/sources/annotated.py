"""What sources have in common whose samples one file of annotations lists, beside a folder of images."""

import csv
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract import schema
from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import UserError
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


class CocoCaptionsSource(AnnotatedImages):
    """Images by id, each with its first captions by annotation id: the file lists both in no order of its own."""

    def __init__(self, description: schema.CocoCaptionsSource, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.annotations, root / description.images)
        self._kept = description.captions

    def _read(self) -> list[Sample]:
        content = read_json(self._annotations)
        texts: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda each: each["id"]):
            texts[annotation["image_id"]].append(annotation["caption"].strip())
        return [
            Sample(
                key=image["file_name"],
                image=image["file_name"],
                captions=numbered(texts[image["id"]][: self._kept]),
                url=image.get("coco_url", ""),
            )
            for image in sorted(content["images"], key=lambda each: each["id"])
        ]


class KarpathySource(AnnotatedImages):
    """The images of one split, in the file's order, with all their captions: five, some of COCO's six or seven.

    An image lies in its `filepath` (COCO's `val2014`) under the folder of images, or directly there without one.
    """

    def __init__(self, description: schema.KarpathySource, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.annotations, root / description.images)
        self._split = description.split

    def _read(self) -> list[Sample]:
        images = read_json(self._annotations)["images"]
        kept = [image for image in images if image["split"] == self._split]
        if not kept:
            splits = ", ".join(sorted({image["split"] for image in images}))
            raise UserError(f"{self._annotations} has no split {self._split!r}; it has {splits}.")
        samples = []
        for image in kept:
            path = (Path(image.get("filepath", "")) / image["filename"]).as_posix()
            texts = [sentence["raw"].strip() for sentence in image["sentences"]]
            samples.append(Sample(key=path, image=path, captions=numbered(texts)))
        return samples


KINDS = ("Object", "Relation", "Both")
"""What the two captions swap, `collapsed_tag` in the file; a sample's label."""


class WinogroundSource(AnnotatedImages):
    """Rows 2k and 2k + 1 are image 0 with caption 0, and image 1 with caption 1, of example k.

    Keys are `<id>/0` and `<id>/1`.
    """

    def __init__(self, description: schema.WinogroundSource, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.examples, root / description.images)

    @property
    def captions(self) -> tuple[str, ...]:
        """One."""
        return ("raw",)

    @property
    def classes(self) -> tuple[str, ...]:
        """What the captions of an example swap."""
        return KINDS

    def _read(self) -> list[Sample]:
        with self._annotations.open(encoding="utf-8") as lines:
            examples = [json.loads(line) for line in lines if line.strip()]
        return [
            Sample(
                key=f"{example['id']}/{side}",
                image=_file_name(example[f"image_{side}"]),
                captions={"raw": example[f"caption_{side}"]},
                label=KINDS.index(example["collapsed_tag"]),
            )
            for example in sorted(examples, key=lambda each: each["id"])
            for side in (0, 1)
        ]


def _file_name(image: str) -> str:
    """The examples name images without their ending."""
    return image if image.endswith(".png") else f"{image}.png"


class MmvpSource(AnnotatedImages):
    """Rows 2k and 2k + 1 are a pair: two images that look alike to CLIP, and what is said of each.

    The file's columns are question id, category and statement; the image is `<category>/<id>.jpg`, in the folder of the
    pair's first row, as in the authors' own evaluation. A sample's label is its category. The statements stand as they
    are in the file: the protocol's "a photo of" is the task's business.
    """

    def __init__(self, description: schema.MmvpSource, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.questions, root / description.images)

    @property
    def captions(self) -> tuple[str, ...]:
        """One."""
        return ("raw",)

    @property
    def classes(self) -> tuple[str, ...]:
        """The categories, in the file's order."""
        return tuple(dict.fromkeys(str(Path(sample.image).parent) for sample in self._samples))

    def _read(self) -> list[Sample]:
        with self._annotations.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row][1:]
        if len(rows) % 2:
            raise ValueError(f"{len(rows)} rows make no pairs")
        categories = list(dict.fromkeys(category.strip() for _, category, _ in rows[::2]))
        samples = []
        for row, (question, _, statement) in enumerate(rows):
            category = rows[row - row % 2][1].strip()
            image = f"{category}/{int(question)}.jpg"
            label = categories.index(category)
            samples.append(Sample(key=image, image=image, captions={"raw": statement.strip()}, label=label))
        return samples
