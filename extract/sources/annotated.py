"""Sources whose samples are listed in one annotation file beside a folder of images.

Kinds: `coco-captions`, `karpathy`, `winoground` and `mmvp`, each in its published form.
"""

import csv
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import UserError
from sail_align.extract.sources.config import FilesConfig, NonEmpty, SourceConfig
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.system.files import read_json


class AnnotatedConfig(FilesConfig, SourceConfig):
    """Base class of these kinds."""

    file_field: ClassVar[str] = "annotations"
    """The field with the path of the annotation file."""
    caption_names: ClassVar[tuple[str, ...]] = ()
    """The names of the captions, if they are not numbered."""
    images: str

    @property
    def file(self) -> str:
        """The path of the annotation file under `root`."""
        return str(getattr(self, self.file_field))

    @property
    def needs(self) -> list[str]:
        """The annotation file and the folder of images."""
        return [self.file, self.images]

    def open(self, data_root: Path) -> "AnnotatedSource":
        """Open the source."""
        return AnnotatedSource(self, data_root)

    @abstractmethod
    def read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        """Return the samples of the annotation file and the names of their classes.

        Keys and locations are paths under the folder of images, unless noted.

        Raises:
            KeyError, TypeError, ValueError: A field is missing or of another form.
        """

    @staticmethod
    def sample(image: str, texts: list[str], url: str = "") -> Sample:
        """Return a sample whose captions are named c0, c1, …. Empty ones are left out."""
        captions = {name: text for name, text in Source.numbered(texts).items() if text}
        return Sample(key=image, image=image, captions=captions, url=url)


class AnnotatedSource(FolderSource):
    """Images in a folder, listed with their captions in a file that is read as a whole.

    Raises:
        UserError: The file or the folder is missing, or the file is not of the published form.
    """

    def __init__(self, config: AnnotatedConfig, data_root: Path):
        self._config = config
        self._file = data_root / config.root / config.file
        self.folder = data_root / config.root / config.images
        self.caption_origins = config.caption_names or config.file
        for path in (self._file, self.folder):
            if not path.exists():
                raise UserError(f"{path} is missing. Correct the manifest's source or set --data-root.")

    @cached_property
    def _annotations(self) -> tuple[list[Sample], tuple[str, ...]]:
        try:
            samples, classes = self._config.read(self._file)
        except (KeyError, TypeError, ValueError) as problem:
            reason = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            raise UserError(f"{self._file} is not of the published form ({reason}).") from problem
        if not samples:
            raise UserError(f"{self._file} contains no samples. Correct the manifest's source.")
        return samples, classes

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # read from the file when first used
        """The categories of the samples, if the file has any."""
        return self._annotations[1]

    def parts(self) -> Sequence[Part]:
        """Return one part, the annotation file."""
        return [Part(self._file.name, lambda: iter(self._annotations[0]), (self._file,))]


class CocoCaptionsConfig(AnnotatedConfig):
    """COCO's own captions JSON (`captions_val2017.json`) and a folder of images.

    Images are sorted by id. Each keeps its first `captions` captions by annotation id, named c0, c1, …. The file itself
    lists both in no particular order.
    """

    kind: Literal["coco-captions"]
    annotations: NonEmpty
    captions: Annotated[int, Field(gt=0)] = 5

    def read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        """Read the annotation file."""
        content = read_json(path)
        texts: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda each: each["id"]):
            texts[annotation["image_id"]].append(annotation["caption"].strip())
        images = sorted(content["images"], key=lambda each: each["id"])
        return [
            self.sample(image["file_name"], texts[image["id"]][: self.captions], image.get("coco_url", ""))
            for image in images
        ], ()


class KarpathyConfig(AnnotatedConfig):
    """Karpathy's JSON (`dataset_coco.json`, `dataset_flickr30k.json`): one split, with all captions of each image.

    Images keep the order of the file; most have five captions, some of COCO's six or seven. An image lies in its
    `filepath` (COCO's `val2014`) under the folder of images, or directly in that folder if it has none.
    """

    kind: Literal["karpathy"]
    annotations: NonEmpty
    split: NonEmpty = "test"

    def read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        """Read the annotation file."""
        images = read_json(path)["images"]
        kept = [image for image in images if image["split"] == self.split]
        if not kept:
            splits = ", ".join(sorted({image["split"] for image in images}))
            raise UserError(f"{path} has no split {self.split!r}. Its splits are {splits}.")
        return [
            self.sample(
                (Path(image.get("filepath", "")) / image["filename"]).as_posix(),
                [sentence["raw"].strip() for sentence in image["sentences"]],
            )
            for image in kept
        ], ()


class WinogroundConfig(AnnotatedConfig):
    """Winoground as published: `examples.jsonl` and a folder of images.

    Rows 2k and 2k + 1 are image 0 with caption 0, and image 1 with caption 1, of example k. Keys are `<id>/0` and
    `<id>/1`. The label is what the two captions swap.
    """

    file_field = "examples"
    caption_names = ("raw",)
    swapped: ClassVar = ("Object", "Relation", "Both")
    """Values of `collapsed_tag` in the file."""

    kind: Literal["winoground"]
    examples: NonEmpty = "examples.jsonl"
    images: str = "images"

    def read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        """Read the annotation file."""
        with path.open(encoding="utf-8") as lines:
            examples = [json.loads(line) for line in lines if line.strip()]
        samples = [
            Sample(
                key=f"{example['id']}/{side}",
                image=example[f"image_{side}"].removesuffix(".png") + ".png",  # published without the ending
                captions={"raw": example[f"caption_{side}"]},
                label=self.swapped.index(example["collapsed_tag"]),
            )
            for example in sorted(examples, key=lambda each: each["id"])
            for side in (0, 1)
        ]
        return samples, self.swapped


class MmvpConfig(AnnotatedConfig):
    """MMVP-VLM as published: `Questions.csv` and a folder of images by category.

    Rows 2k and 2k + 1 are a pair: two images that look alike to CLIP, and a statement about each. The columns are
    question id, category and statement. The image is `<category>/<id>.jpg`, in the folder of the pair's first row, as
    in the authors' own evaluation. The label is the category. Statements are kept as they are in the file, because the
    task adds the protocol's "a photo of".
    """

    file_field = "questions"
    caption_names = ("raw",)

    kind: Literal["mmvp"]
    questions: NonEmpty = "Questions.csv"
    images: str = "MLLM_VLM Images"

    def read(self, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
        """Read the annotation file."""
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row][1:]
        if len(rows) % 2:
            raise ValueError(f"{len(rows)} rows cannot be split into pairs")
        categories = list(dict.fromkeys(category.strip() for _, category, _ in rows[::2]))
        samples = []
        for row, (question, _, statement) in enumerate(rows):
            category = rows[row - row % 2][1].strip()
            image = f"{category}/{int(question)}.jpg"
            label = categories.index(category)
            samples.append(Sample(key=image, image=image, captions={"raw": statement.strip()}, label=label))
        return samples, tuple(categories)
