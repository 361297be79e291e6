"""How a manifest describes where samples come from: one class a source kind."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NonEmpty = Annotated[str, Field(min_length=1)]
MaskValue = Annotated[int, Field(ge=0, le=255)]


class Strict(BaseModel):
    """A mapping whose fields are all known: an unknown one is a typing slip."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Files(Strict):
    """A source whose files lie under `root`, a folder under the data root."""

    root: str = "."

    @property
    def needs(self) -> list[str]:
        """The files and folders under `root` without which there are no samples; patterns may hold `*`."""
        return ["."]


class Split(Strict):
    """Keep the rows whose `column` in `file` (the tables themselves if absent) holds `keep`, joined by the image."""

    column: str
    keep: str
    file: str | None = None


class TableSource(Files):
    """Tables (CSV, TSV, JSONL, parquet) that name images in a folder and hold their captions.

    Either one row an image with a column for each caption name (`captions: {raw: title, long: description}`), or
    several rows an image with one caption each (`captions: caption`), which become `c0`, `c1`, … in file order. A
    column of lists (JSONL, parquet) counts as several rows. `url` is a column that says where an image came from.
    `masks` is a folder of PNGs with the images' names, and `classes` names their pixel values; others are ignored.
    """

    kind: Literal["table"]
    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    images: str = "."
    image: str = "image"
    url: NonEmpty | None = None
    captions: NonEmpty | Annotated[dict[str, NonEmpty], Field(min_length=1)]
    split: Split | None = None
    masks: str | None = None
    classes: dict[Annotated[int, Field(ge=0, le=254)], str] = {}

    @property
    def needs(self) -> list[str]:
        """The tables, and the folder of images."""
        return [*([self.files] if isinstance(self.files, str) else self.files), self.images]


class Recaptions(Files):
    """Tables with further captions of a source's images, one row an image: any kind of source, any kind of table.

    A row belongs to the samples whose URL is what the row has in its column `url`, or whose key is what it has in its
    column `key`: exactly, character by character. `captions` gives a name to each column that is wanted.
    """

    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    url: NonEmpty | None = None
    key: NonEmpty | None = None
    captions: Annotated[dict[str, NonEmpty], Field(min_length=1)]

    @property
    def needs(self) -> list[str]:
        """The tables."""
        return [self.files] if isinstance(self.files, str) else self.files

    @model_validator(mode="after")
    def _joins_by_one_column(self) -> "Recaptions":
        if (self.url is None) == (self.key is None):
            raise ValueError("name one column that joins, either 'url' or 'key'")
        return self


class ClassFolderSource(Files):
    """A folder with one sub-folder of images a class.

    `classes` renames folders, in label order, or names a published list of class names (`open_clip:imagenet`): for
    folders named by ImageNet's WordNet ids or any of them, by numbers, or for as many others in sorted order.
    """

    kind: Literal["class-folder"]
    classes: dict[str, str] | NonEmpty | None = None

    @property
    def needs(self) -> list[str]:
        """One sub-folder at least."""
        return ["*/"]


class CocoCaptionsSource(Files):
    """COCO's own captions JSON (`captions_val2017.json`) and a folder of images.

    Images in the order of their ids; each keeps its first `captions` captions, in the order of theirs: c0, c1, …
    """

    kind: Literal["coco-captions"]
    annotations: NonEmpty
    images: str
    captions: Annotated[int, Field(gt=0)] = 5

    @property
    def needs(self) -> list[str]:
        """The annotations, and the folder of images."""
        return [self.annotations, self.images]


class KarpathySource(Files):
    """Karpathy's JSON (`dataset_coco.json`, `dataset_flickr30k.json`): one split, with all captions of each image."""

    kind: Literal["karpathy"]
    annotations: NonEmpty
    images: str
    split: NonEmpty = "test"

    @property
    def needs(self) -> list[str]:
        """The annotations, and the folder of images."""
        return [self.annotations, self.images]


class WinogroundSource(Files):
    """Winoground as published: `examples.jsonl` and a folder of images. Rows 2k and 2k + 1 are one example."""

    kind: Literal["winoground"]
    examples: NonEmpty = "examples.jsonl"
    images: str = "images"

    @property
    def needs(self) -> list[str]:
        """The examples, and the folder of images."""
        return [self.examples, self.images]


class MmvpSource(Files):
    """MMVP-VLM as published: `Questions.csv` and a folder of images by category. Rows 2k and 2k + 1 are one pair."""

    kind: Literal["mmvp"]
    questions: NonEmpty = "Questions.csv"
    images: str = "MLLM_VLM Images"

    @property
    def needs(self) -> list[str]:
        """The questions, and the folder of images."""
        return [self.questions, self.images]


class MaskFolderSource(Files):
    """A folder of images and one of masks (PNGs of one channel or a palette) with the same names.

    `names` is a list of the images to take, without their ending, one a line; without it, all that have a mask.
    `classes` names labels, or a table of them (`ade20k-150`); a mask holds label − `label_offset`. Values in `ignored`
    count for nothing; any other is refused, because it means that the masks are not what the manifest says.
    """

    kind: Literal["mask-folder"]
    images: str
    masks: str
    names: str | None = None
    classes: dict[MaskValue, str] | NonEmpty
    label_offset: int = 0
    ignored: list[MaskValue] = []

    @property
    def needs(self) -> list[str]:
        """The folders of images and masks, and the list of names."""
        return [self.images, self.masks, *([self.names] if self.names else [])]


Origin = Annotated[str, Field(pattern=r"^(json:.+|[^:.][^:]*)$")]
"""Where in a sample a value comes from: `txt` is its member of that ending, `json:caption` a field of its json."""


class WebDatasetSource(Files):
    """Tars of samples as WebDataset and img2dataset write them: members of one key, `<key>.jpg`, `<key>.txt`, ….

    `files` are tars under `root`, absolute paths or URLs: names, globs, or with ranges (`{00000..00331}.tar`).
    `captions` maps a caption's name to its origin; with a single origin each line of it (or each text of a list in the
    json) is a caption: `c0`, `c1`, …. A field `json:…` is taken from the `.parquet` beside a tar where a sample has no
    json. `classes` is a file under `root` (or a URL) with a class name a line, a published list (`open_clip:imagenet`),
    or the names themselves; `label` is then the origin of a class's number. Of several images under one key, the first
    ending in `images` counts.
    """

    kind: Literal["webdataset"]
    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] = "*.tar"
    captions: Origin | dict[str, Origin] = {}
    url: Origin = "json:url"
    label: Origin = "cls"
    classes: NonEmpty | Annotated[list[str], Field(min_length=1)] | None = None
    images: Annotated[list[NonEmpty], Field(min_length=1)] = ["jpg", "jpeg", "png", "webp"]

    @property
    def needs(self) -> list[str]:
        """The tars that lie under `root`, and the list of class names if it does."""
        files = [self.files] if isinstance(self.files, str) else self.files
        needed = [re.sub(r"\{\d+\.\.\d+\}", "*", file) for file in files]
        needed += [self.classes] if isinstance(self.classes, str) else []
        return [name for name in needed if ":" not in name and not name.startswith("/")]


class HuggingFaceSource(Files):
    """A data set of the library `datasets`: the folder `root`, as `save_to_disk` wrote it, or `name` on the hub.

    `image`, `captions`, `label` and `url` name columns. `captions` maps a caption's name to a column of text; a single
    column (of text, or of lists of it) gives `c0`, `c1`, …. `classes` are needed where the label's column has no names.
    """

    kind: Literal["hugging-face"]
    name: NonEmpty | None = None
    config: str | None = None
    revision: str | None = None
    split: NonEmpty = "train"
    image: NonEmpty = "image"
    captions: NonEmpty | dict[str, NonEmpty] = {}
    label: NonEmpty | None = None
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    url: NonEmpty | None = None

    @property
    def needs(self) -> list[str]:
        """The folder; nothing for a name on the hub."""
        return [] if self.name else ["."]


class DemoSource(Strict):
    """Scenes composed from OpenMoji drawings; nothing is read from the data root.

    `version` rises when the code draws other pictures for the same rows, so that no store mixes the two.
    """

    kind: Literal["demo"]
    part: Literal["train", "retrieval", "objects", "unseen", "pairs", "segmentation"]
    version: Literal[1] = 1


Source = Annotated[
    TableSource
    | ClassFolderSource
    | CocoCaptionsSource
    | KarpathySource
    | WinogroundSource
    | MmvpSource
    | MaskFolderSource
    | WebDatasetSource
    | HuggingFaceSource
    | DemoSource,
    Field(discriminator="kind"),
]
