"""Recognition of a path: a file, or a folder by what is in it."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError, command, listing
from sail_align.extract.recognise.annotations import recognise_annotations
from sail_align.extract.recognise.columns import Choices, UndecidedError, Understood
from sail_align.extract.recognise.hub import recognise_hub_folder
from sail_align.extract.recognise.tables import TABLES, has_image_bytes, recognise_tables
from sail_align.extract.recognise.tars import recognise_tars
from sail_align.extract.sources.class_folder import imagenet_ids
from sail_align.extract.sources.hugging_face_load import was_saved
from sail_align.extract.sources.images import ending_of, folders_below, image_endings, is_folder
from sail_align.extract.sources.table_files import text_columns

MOST_ANNOTATIONS = 8
"""JSON files of a folder that are looked into. More of them describe single images."""
LARGEST_JSON = 2 << 30
KNOWN = (
    "a folder of images, class folders, a table (.csv, .tsv, .jsonl, .parquet), tars, annotations of COCO or Karpathy "
    "(.json), or a folder of the Hugging Face library"
)
_SPLIT = re.compile("(train|val|valid|validation|test|dev)(ing)?", re.IGNORECASE)


def recognise(path: Path, choices: Choices) -> Understood:
    """Return how to read a file or folder.

    Raises:
        UserError: It is nothing that can be read, or a choice does not fit it. The message says what is there.
        UndecidedError: The user has to pass an option.
    """
    if path.is_dir():
        return _recognise_folder(path, choices)
    if not path.is_file():
        raise UserError(f"{path} is missing. Give {KNOWN}.")
    match path.suffix.lower():
        case ".parquet" if has_image_bytes(path):
            return recognise_hub_folder(path, choices)
        case suffix if suffix in TABLES:
            return recognise_tables([path], choices)
        case ".json":
            return recognise_annotations(path, choices)
        case ".tar":
            return recognise_tars(path.parent, [path.name], choices)
        case ".gz" | ".tgz" | ".zip" | ".7z" | ".zst" | ".bz2" | ".xz" as suffix:
            raise UserError(f"{path} is compressed ({suffix}). Unpack it, and give what it contains.")
        case ".xlsx" | ".xls" | ".ods" as suffix:
            raise UserError(f"{path} is a spreadsheet ({suffix}). Save it as CSV in UTF-8.")
        case suffix:
            raise UserError(f"{path} is of an unknown form: got the ending {suffix!r}. Give {KNOWN}.")


@dataclass
class _Content:
    """Paths in a folder by what they seem to be: from their endings, without opening a file.

    Attributes:
        images: Number of images by the folder they are in.
        with_text: Number of images that have a `.txt` of their name.
        tables, annotations, tars: Paths of such files.
        others: Number of other files by ending.
    """

    images: Counter[str] = field(default_factory=Counter)
    with_text: int = 0
    tables: list[str] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, root: Path) -> "_Content":
        content, endings = cls(), image_endings()
        for folder in folders_below(root):
            with os.scandir(root / folder) as entries:
                names = sorted(entry.name for entry in entries if entry.name[0] != "." and not is_folder(entry))
            of_kind = {".json": content.annotations, ".tar": content.tars, **dict.fromkeys(TABLES, content.tables)}
            stems = {name.lower() for name in names}
            for name in names:
                stem, ending = os.path.splitext(name.lower())
                if ending in endings:
                    content.images[folder] += 1
                    content.with_text += f"{stem}.txt" in stems or f"{stem}{ending}.txt" in stems
                elif ending in of_kind and os.path.isfile(root / folder / name):  # not a FIFO or a device
                    of_kind[ending].append(os.path.join(folder, name))
                else:
                    content.others[ending_of(name)] += 1
        return content


def _recognise_folder(folder: Path, choices: Choices) -> Understood:
    if (folder / "zarr.json").is_file():
        how = command("sail-extract", "status", folder)
        raise UserError(f"{folder} is a feature store, not a data set. See `{how}`.")
    if was_saved(folder):
        return recognise_hub_folder(folder, choices)
    content = _Content.of(folder)
    parquet = [name for name in content.tables if name.lower().endswith(".parquet")]
    if parquet and has_image_bytes(folder / parquet[0]):
        return recognise_hub_folder(folder, choices)
    if content.tars and not content.images:
        return recognise_tars(folder, content.tars, choices)
    notes: list[str] = []
    if content.tables or (content.images and content.annotations):
        listed = _recognise_listed(folder, content, choices, notes)
        if listed:
            return listed
    if not content.images and content.others["without extension"] == 0:
        there = ", ".join(f"{count:,} {ending}" for ending, count in content.others.most_common(5))
        raise UserError(f"{folder} contains no images, tables or tars ({there or 'it is empty'}). Give {KNOWN}.")
    choices.require_unused(("--image-column", "--caption-columns", "--images"), f"{folder} has no table of images")
    understood = _class_folders(folder, content) or _plain_images(folder, content)
    understood.notes.extend(notes)
    if content.tars:
        understood.notes.append(f"{len(content.tars):,} tars in it are not read; give their path to use them")
    return understood


def _recognise_listed(folder: Path, content: _Content, choices: Choices, notes: list[str]) -> Understood | None:
    """Return how to read the table or annotation file of a folder; None if none names images that are there.

    Args:
        folder: The folder.
        content: Its content.
        choices: The user's choices.
        notes: Receives why tables of a folder of images are not read.

    Raises:
        UserError: Several files do, or the folder has nothing else.
        UndecidedError: The user has to name a column of a file.
    """
    found: dict[str, Understood] = {}
    problems: dict[str, UserError] = {}
    names = content.tables + (content.annotations if len(content.annotations) <= MOST_ANNOTATIONS else [])
    groups = _same_columns(folder, content.tables) if len(content.tables) > 1 and not content.images else None
    for name in names[: 2 * MOST_ANNOTATIONS]:
        file = folder / name
        try:
            if name in content.tables:
                files = [folder / each for each in groups] if groups else [file]
                found[name] = recognise_tables(files, choices)
                if groups:
                    break
            elif file.stat().st_size <= LARGEST_JSON:
                found[name] = recognise_annotations(file, choices)
        except UserError as problem:
            problems[name] = problem
    if len(found) > 1:
        raise UserError(
            f"{folder} has several files that list images: {listing(found)}. Give the path of one, such as "
            f"{folder / next(iter(found))}."
        )
    if found:
        return next(iter(found.values()))
    undecided: list[UserError] = [each for each in problems.values() if isinstance(each, UndecidedError)]
    if problems and (undecided or not content.images or any(choices.given())):
        raise [*undecided, *problems.values()][0]
    notes += [f"{name} is not read: {each}".rstrip(".") for name, each in problems.items() if name in content.tables]
    return None


def _same_columns(folder: Path, names: list[str]) -> list[str] | None:
    """Return tables of one folder and form that have the same columns; None if they do not."""
    if len({(os.path.dirname(name), Path(name).suffix.lower()) for name in names}) > 1:
        return None
    columns = {tuple(text_columns(folder / name)) for name in names}
    return names if len(columns) == 1 else None


def _class_folders(folder: Path, content: _Content) -> Understood | None:
    """Return how to read one subfolder of images per class; None if the folders are not of this form.

    Raises:
        UserError: The subfolders are splits, each with class folders.
    """
    names = sorted({name.split(os.sep)[0] for name in content.images if name})
    if "" in content.images or content.with_text or len(names) < 2:
        return None
    deep = [name for name in content.images if os.sep in name]
    if all(_SPLIT.fullmatch(name) for name in names):
        if len(deep) < len(content.images):
            return None
        raise UserError(
            f"{folder} has the splits {listing(names)}, each with folders of images. Give the path of one, such as "
            f"{folder / names[0]}."
        )
    ids = set(imagenet_ids())
    if deep or not all(re.search(r"[^\W\d_]", name) for name in names):
        return None
    source: dict[str, Any] = {"kind": "class-folder", "classes": {name: name.replace("_", " ") for name in names}}
    notes = ["each folder is a class. To read it as images without classes, write `kind: images` and no `classes`"]
    if set(names) <= ids:
        source["classes"] = "open_clip:imagenet"
        notes[0] = "the folders are ImageNet's WordNet ids; their names come from `pip install 'sail-align[eval]'`"
    return Understood("one folder of images per class", folder, source, {"kind": "classification"}, notes)


def _plain_images(folder: Path, content: _Content) -> Understood:
    source: dict[str, Any] = {"kind": "images"}
    if not content.with_text:
        hints = ["  captions: {raw: txt}   # with a text file beside each image: dog.txt for dog.jpg"]
        return Understood("a folder of images", folder, source, hints=hints)
    source["captions"] = {"raw": "txt"}
    hints = ["  captions: txt   # each line is a caption: c0, c1, …"]
    return Understood("a folder of images with text files beside them", folder, source, hints=hints)
