"""Recognition of data sets of the Hugging Face library: saved by it, or downloaded from the hub as parquet files."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError, listing
from sail_align.extract.recognise.columns import Choices, UndecidedError, Understood, choose_captions, name_captions
from sail_align.extract.sources.hugging_face import HuggingFaceConfig, holds_images
from sail_align.extract.sources.hugging_face_load import CannotStreamError, open_rows, split_names, was_saved
from sail_align.extract.sources.hugging_face_rows import Rows

PROBED = 200
"""Rows whose texts are looked at."""


def recognise_hub_folder(folder: Path, choices: Choices) -> Understood:
    """Return how to read a folder that `save_to_disk` wrote or that was downloaded from the hub, or a file of it.

    Raises:
        UserError: The library is not installed, or cannot read the folder, or a choice does not fit the data set.
        UndecidedError: The user has to name a column.
    """
    choices.require_unused(("--images",), f"the data set in {folder} has its images in a column")
    splits = ["train"] if folder.is_file() else split_names(folder)
    split = "train" if "train" in splits or not splits else splits[0]
    rows, streaming = _open(folder, split)
    images = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"] or [
        name
        for name, feature in rows.features.items()
        if type(feature).__name__ in ("Value", "dict") and holds_images(rows.schema.field(name).type)
    ]  # that were not cast to Image
    image = choices.image_column or (images[0] if len(images) == 1 else None)
    if not images:
        raise UserError(f"{folder} has no column of images. Its columns are: {listing(rows.features)}.")
    if image not in images:
        what = "--image-column is invalid: " if image else ""
        raise UndecidedError(f"{what}{folder} has images in the columns {listing(images)}. Pass --image-column.")
    types = {name: str(getattr(feature, "feature", feature)) for name, feature in rows.features.items()}
    texts = [name for name, kind in types.items() if "string" in kind]
    tables = (table for each in rows.stretches() for table in rows.tables(each, texts)) if texts else iter(())
    first = next(tables, None)
    columns: dict[str, list[Any]] = {name: first[name][:PROBED].to_pylist() for name in texts} if first else {}
    chosen = choose_captions(columns, choices, folder)
    lists = [name for name in chosen if any(isinstance(value, list) for value in columns[name])]
    source: dict[str, Any] = {"kind": "hugging-face", "split": split, "image": image}
    if streaming:
        source["streaming"] = True
    if chosen:
        source["captions"] = chosen[0] if lists and len(chosen) == 1 else name_captions(chosen)
    labels = [name for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    task = None
    if len(labels) == 1 and not chosen:
        source["label"], task = labels[0], {"kind": "classification"}
    notes = []
    if len(splits) > 1:
        notes.append(f"splits: {listing(splits)}; {split!r} is used. Change `split` in the manifest for another")
    if unused := [name for name in rows.features if name not in {image, source.get("label"), *chosen}]:
        notes.append(f"columns not used: {listing(unused)}")
    return Understood("a data set of the Hugging Face library", folder, source, task, notes)


def _open(folder: Path, split: str) -> tuple[Rows, bool]:
    """Return the rows of a split, and whether they are streamed. Parquet files then need no copy in a cache."""
    where: dict[str, Any] = {"kind": "hugging-face", "root": str(folder), "split": split}
    if not was_saved(folder):
        with suppress(CannotStreamError):  # the library takes the folder for one of another format
            return open_rows(HuggingFaceConfig(**where, streaming=True), Path()), True
    return open_rows(HuggingFaceConfig(**where), Path()), False
