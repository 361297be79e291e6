"""Sources whose samples are listed in one annotation file beside a folder of images.

Kinds: `coco-captions`, `karpathy`, `winoground` and `mmvp`, each in its published form.
"""

import csv
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import FailFast, Field, StrictInt
from typing_extensions import TypedDict

from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import UserError, listing
from sail_align.extract.sources.config import NonEmpty, PathsConfig, SourceConfig
from sail_align.extract.sources.file_set import Fence
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.sources.table_files import replace_surrogates
from sail_align.extract.system.files import json_lines, open_regular, read_json
from sail_align.extract.system.validation import shortened, validated

Id = StrictInt | str
Caption = str | None
"""A caption as files list it. None and text without a word stand for a caption that is absent."""
PairedCaption = Annotated[str, Field(pattern=r"\S")]
"""A caption that a pair cannot do without."""


class AnnotatedConfig(PathsConfig, SourceConfig):
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
            ValueError: An entry is invalid; the message names it.
            OSError, csv.Error: The file cannot be read or is not of its format.
        """

    @staticmethod
    def sample(image: str, texts: Sequence[Caption], url: str = "", most: int | None = None) -> Sample:
        """Return a sample whose first `most` captions are named c0, c1, …. Absent ones are not counted."""
        captions = [replace_surrogates(text.strip()) for text in texts if text and text.strip()]
        return Sample(key=image, image=image, captions=Source.numbered(captions[:most]), url=url)


class AnnotatedSource(FolderSource):
    """Images in a folder, listed with their captions in a file that is read as a whole.

    Raises:
        UserError: The file or the folder is missing, or the file is not of the published form.
    """

    def __init__(self, config: AnnotatedConfig, data_root: Path):
        self._config = config
        self._file = data_root / config.root / config.file
        self.folder = data_root / config.root / config.images
        self.fence = Fence(data_root, config.allow_outside)
        for path in (self._file, self.folder):
            if not path.exists():
                raise UserError(f"{path} is missing. Correct the manifest's source or set --data-root.")

    @cached_property
    def _annotations(self) -> tuple[list[Sample], tuple[str, ...]]:
        try:
            samples, classes = self._config.read(self._file)
            _require_unique("sample", [sample.key for sample in samples])
            for sample in samples:
                self.fence.path(self.folder, sample.image)
        except UserError as problem:
            raise UserError(f"{self._file} cannot be used: {problem}") from problem
        except (OSError, ValueError, csv.Error) as problem:
            reason = " ".join(str(problem).split())
            raise UserError(f"{self._file} is not of the published form ({reason}). Correct the file.") from problem
        if not any(sample.captions for sample in samples):
            what = "captions" if samples else "samples"
            raise UserError(f"{self._file} contains no {what}. Correct the manifest's source.")
        return samples, classes

    @cached_property
    def caption_origins(self) -> str | tuple[str, ...]:  # type: ignore[override]  # reads the file when first used
        """The names of the captions, or the annotation file if they are numbered."""
        _ = self._annotations  # so that a broken file is an error before encoders are downloaded
        return self._config.caption_names or self._config.file

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # read from the file when first used
        """The categories of the samples, if the file has any."""
        return self._annotations[1]

    def parts(self) -> Sequence[Part]:
        """Return one part, the annotation file."""
        return [Part(self._file.name, lambda: iter(self._annotations[0]), (self._file,))]


class _CocoImage(TypedDict):
    id: Id
    file_name: NonEmpty
    coco_url: NotRequired[str | None]


class _CocoCaption(TypedDict):
    id: Id
    image_id: Id
    caption: Caption


class _Coco(TypedDict):
    images: Annotated[list[_CocoImage], FailFast()]
    annotations: Annotated[list[_CocoCaption], FailFast()]


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
        content = validated(_Coco, read_json(path))
        _require_unique("image id", [image["id"] for image in content["images"]])
        texts: dict[Id, list[Caption]] = {image["id"]: [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=_order):
            if annotation["image_id"] not in texts:
                raise ValueError(
                    f"annotation {annotation['id']!r} names image {annotation['image_id']!r}, "
                    "which 'images' does not list"
                )
            texts[annotation["image_id"]].append(annotation["caption"])
        images = sorted(content["images"], key=_order)
        return [
            self.sample(image["file_name"], texts[image["id"]], image.get("coco_url") or "", self.captions)
            for image in images
        ], ()


class _Sentence(TypedDict):
    raw: Caption


class _KarpathyImage(TypedDict):
    filepath: NotRequired[str | None]
    filename: NonEmpty
    split: str
    sentences: list[_Sentence]


class _Karpathy(TypedDict):
    images: Annotated[list[_KarpathyImage], FailFast()]


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
        images = validated(_Karpathy, read_json(path))["images"]
        kept = [image for image in images if image["split"] == self.split]
        if not kept:
            splits = listing(sorted({image["split"] for image in images}))
            raise UserError(f"{path} has no split {self.split!r}. Its splits are {splits}.")
        return [
            self.sample(
                (Path(image.get("filepath") or "") / image["filename"]).as_posix(),
                [sentence["raw"] for sentence in image["sentences"]],
            )
            for image in kept
        ], ()


class _WinogroundExample(TypedDict):
    id: Id
    image_0: NonEmpty
    image_1: NonEmpty
    caption_0: PairedCaption
    caption_1: PairedCaption
    collapsed_tag: Literal["Object", "Relation", "Both"]


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
        with TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            examples = [
                validated(_WinogroundExample, example, f"line {number}") for number, example in json_lines(file)
            ]
        samples = [
            Sample(
                key=f"{example['id']}/{side}",
                image=image.removesuffix(".png") + ".png",  # published without the ending
                captions={"raw": replace_surrogates(caption)},
                label=self.swapped.index(example["collapsed_tag"]),
            )
            for example in sorted(examples, key=_order)
            for side, image, caption in (
                (0, example["image_0"], example["caption_0"]),
                (1, example["image_1"], example["caption_1"]),
            )
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
        with TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header, *rows = [(reader.line_num, row) for row in reader if row] or [(1, [""])]
            except csv.Error as problem:
                raise ValueError(f"line {reader.line_num}: {problem}") from problem
        if header[1][0].strip().isdecimal():
            raise ValueError("it does not begin with the names of its columns")
        for line, row in rows:
            if any("\n" in field for field in row):
                raise ValueError(f"line {line}: got a quoted field of several lines; a quotation mark may be missing")
            if len(row) != 3 or not row[0].strip().isdecimal() or not row[1].strip() or not row[2].strip():
                raise ValueError(f"line {line}: got {shortened(row)}, expected a number, a category and a statement")
        if len(rows) % 2:
            raise ValueError(f"{len(rows)} rows cannot be split into pairs")
        categories = list(dict.fromkeys(category.strip() for _, (_, category, _) in rows[::2]))
        samples = []
        for number, (_, (question, _, statement)) in enumerate(rows):
            category = rows[number - number % 2][1][1].strip()
            image = f"{category}/{int(question)}.jpg"
            label = categories.index(category)
            samples.append(Sample(key=image, image=image, captions={"raw": statement.strip()}, label=label))
        return samples, tuple(categories)


def _require_unique(what: str, names: Sequence[Id]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{what} {name!r} is listed {count} times")


def _order(entry: Any) -> tuple[bool, Id]:
    """Return a sort key by id, numbers before text."""
    return isinstance(entry["id"], str), entry["id"]
