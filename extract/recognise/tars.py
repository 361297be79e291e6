"""Recognition of tars in the form of WebDataset."""

import json
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError, listing
from sail_align.extract.recognise.columns import (
    Choices,
    UndecidedError,
    Understood,
    choose_captions,
    holds_captions,
    name_captions,
)
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.sources.images import image_endings
from sail_align.extract.sources.tars import TarSamples

PROBED = 300
"""Samples of the first tar whose texts are looked at."""
CLASS_NAMES = "classnames.txt"
"""File with the names of the classes, in the form of clip-benchmark."""
DEFAULT_IMAGES = ["jpg", "jpeg", "png", "webp"]


def recognise_tars(root: Path, names: list[str], choices: Choices) -> Understood:
    """Return how to read tars under a folder.

    Raises:
        UserError: The first tar has no images, or a choice does not fit it.
        UndecidedError: Several fields of the json may be captions.
    """
    first = root / names[0]
    choices.require_unused(("--image-column", "--images"), f"{first} contains its images")
    source: dict[str, Any] = {"kind": "webdataset", "files": _pattern(names)}
    columns, endings = _texts(root, names[0])
    images = [ending for ending in endings if f".{ending.rpartition('.')[2]}" in image_endings()]
    if not images:
        found = listing(sorted(endings)) or "nothing"
        raise UserError(f"{first} contains no images: its members end in {found}. Expected .jpg, .png, ….")
    plain = [ending for ending in images if "." not in ending]  # not 0.png or mask.png
    if not set(plain) & set(DEFAULT_IMAGES):
        source["images"] = plain or images
    chosen = ["txt"] if "txt" in columns and not choices.caption_columns else choose_captions(columns, choices, first)
    lists = [name for name in chosen if any(isinstance(value, list) for value in columns[name])]
    if lists and len(chosen) > 1:
        raise UndecidedError(f"{first} has lists of captions in {lists[0]!r}. Pass --caption-columns {lists[0]} alone.")
    source["captions"] = chosen[0] if lists else name_captions(chosen)
    task, notes = None, []
    if "cls" in endings and not chosen:
        classes = next((name for name in (CLASS_NAMES, f"../{CLASS_NAMES}") if (root / name).is_file()), None)
        if classes:
            source["classes"], task = classes, {"kind": "classification"}
        else:
            notes.append(f"labels (.cls) are not used: there is no {CLASS_NAMES} with the names of the classes")
    if unused := [name for name, values in columns.items() if name not in chosen and holds_captions(values)]:
        notes.append(f"texts not used: {listing(unused)}")
    what = f"{len(names):,} tars of samples" if len(names) > 1 else "a tar of samples"
    return Understood(what, root, source, task, notes)


def _texts(root: Path, tar: str) -> tuple[dict[str, list[Any]], Counter[str]]:
    """Return values of the texts of a tar's samples by origin (`txt`, `json:caption`, …), and its members by ending.

    Raises:
        UserError: The tar is compressed.
    """
    files = FileSet(root)
    found = TarSamples.read(files, tar, (), {"txt", "json"})
    if texts := {ending for ending in found.endings if ending.endswith(".txt")}:
        found = TarSamples.read(files, tar, (), {"txt", "json", *texts})
    columns: dict[str, list[Any]] = {}
    for sample in islice(found.samples.values(), PROBED):
        with suppress(ValueError, RecursionError):
            row = json.loads(sample.pop("json", "{}"))
            sample |= {f"json:{name}": value for name, value in row.items()} if isinstance(row, dict) else {}
        for origin, value in sample.items():
            columns.setdefault(origin, []).append(value)
    return columns, found.endings


def _pattern(names: list[str]) -> str | list[str]:
    """Return a pattern of the tars if they are all in one folder or all in subfolders of it, else their names."""
    folders = {name.rpartition("/")[0] for name in names}
    if len(names) == 1 or any("/" in folder for folder in folders):
        return names if len(names) > 1 else names[0]
    if folders == {""}:
        return "*.tar"
    return names if "" in folders else "*/*.tar"
