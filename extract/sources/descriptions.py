"""How a manifest describes where samples come from: one class a source kind."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

NonEmpty = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A mapping whose fields are all known: an unknown one is a typing slip."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Split(Strict):
    """Keep the rows whose `column` in `file` (the tables themselves if absent) holds `keep`, joined by the image."""

    column: str
    keep: str
    file: str | None = None


class TableSource(Strict):
    """Tables (CSV, TSV, JSONL, parquet) that name images in a folder and hold their captions.

    Either one row an image with a column for each caption name (`captions: {raw: title, long: description}`), or
    several rows an image with one caption each (`captions: caption`), which become `c0`, `c1`, … in file order. A
    column of lists (JSONL, parquet) counts as several rows. `masks` is a folder of PNGs with the images' names, and
    `classes` names their pixel values; other values are ignored.
    """

    kind: Literal["table"]
    root: str = "."
    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    images: str = "."
    image: str = "image"
    captions: NonEmpty | Annotated[dict[str, NonEmpty], Field(min_length=1)]
    split: Split | None = None
    masks: str | None = None
    classes: dict[Annotated[int, Field(ge=0, le=254)], str] = {}


class ClassFolderSource(Strict):
    """A folder with one sub-folder of images a class; `classes` renames folders, in label order."""

    kind: Literal["class-folder"]
    root: str = "."
    classes: dict[str, str] | None = None


class DemoSource(Strict):
    """Scenes composed from OpenMoji drawings; nothing is read from the data root.

    `version` rises when the code draws other pictures for the same rows, so that no store mixes the two.
    """

    kind: Literal["demo"]
    part: Literal["train", "retrieval", "objects", "unseen", "pairs", "segmentation"]
    version: Literal[1] = 1


Source = Annotated[TableSource | ClassFolderSource | DemoSource, Field(discriminator="kind")]
