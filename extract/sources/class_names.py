"""Class names and prompt templates by reference to where they are published, so that nobody types them again.

A reference is `open_clip:<list>`, `clip_benchmark:<data set>`, or the name of a table of labels that comes with the
project. The two libraries belong to the extra `eval` and are looked into when a reference is resolved, not before.
"""

import csv
import importlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from sail_align.extract.errors import UserError

LIBRARIES = ("open_clip:", "clip_benchmark:")
"""How a reference begins that names a library's list."""
_CLASSES = "sail_align.data_manifests"
_OPEN_CLIP = {
    "imagenet": "IMAGENET_CLASSNAMES",
    "imagenet-80": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet-7": "SIMPLE_IMAGENET_TEMPLATES",
}


def class_names(reference: str) -> list[str]:
    """Return a published list of class names, such as `open_clip:imagenet` (OpenAI's 1,000), in label order.

    Raises:
        UserError: There is no such list, or the library that holds it is not installed.
    """
    match reference.split(":", 1):
        case ["open_clip", "imagenet"]:
            return list(_open_clip("imagenet"))
        case ["clip_benchmark", name]:
            return list(_clip_benchmark("en_classnames.json", name))
    raise UserError(f"No list of class names {reference!r}; give open_clip:imagenet or clip_benchmark:<data set>.")


def templates(reference: str) -> list[str]:
    """Return published prompt templates, each with one `{}` for the class name.

    `open_clip:imagenet-80` are OpenAI's for ImageNet, `open_clip:imagenet-7` their short list, and
    `clip_benchmark:<data set>` those of LAION's benchmark.

    Raises:
        UserError: There is no such list, or the library that holds it is not installed.
    """
    match reference.split(":", 1):
        case ["open_clip", "imagenet-80" | "imagenet-7" as name]:
            return [template("{}") for template in _open_clip(name)]
        case ["clip_benchmark", name]:
            found = _clip_benchmark("en_zeroshot_classification_templates.json", name)
            return [template.replace("{c}", "{}") for template in found]
    raise UserError(
        f"No templates {reference!r}; give open_clip:imagenet-80, open_clip:imagenet-7 or clip_benchmark:<data set>."
    )


def label_names(name: str) -> dict[int, str]:
    """Return a packaged table of labels, such as `ade20k-150`: names by label, without synonyms.

    Raises:
        UserError: There is no such table.
    """
    folder = resources.files(_CLASSES) / "classes"
    if not (path := folder / f"{name}.tsv").is_file():
        stems = sorted(entry.name[:-4] for entry in folder.iterdir() if entry.name.endswith(".tsv"))
        raise UserError(f"No table of labels {name!r}; give a mapping or one of: {', '.join(stems)}.")
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    return {int(row["label"]): row["name"] for row in rows}


def names_of_folders(reference: str, folders: Sequence[str]) -> dict[str, str]:
    """Return the class names of folders, in label order, from a published list.

    Folders may be WordNet ids, of ImageNet's 1,000 or any of them (ImageNet-A and -R have 200), or the numbers of the
    classes (ImageNet-V2, whose 10 is sorted before 2); else there must be one a name, in the names' order when sorted.

    Raises:
        UserError: There is no such list, or the folders are of another number.
    """
    names = class_names(reference)
    ids = wordnet_ids() if reference == "open_clip:imagenet" else []
    for known in (ids, [str(number) for number in range(len(names))]):
        if folders and set(folders) <= set(known):
            return {folder: names[label] for label, folder in enumerate(known) if folder in set(folders)}
    if len(names) != len(folders):
        hint = " They are neither all numbers nor all WordNet ids of ImageNet's." if ids else ""
        raise UserError(f"There are {len(folders)} folders, but {reference} names {len(names)} classes.{hint}")
    return dict(zip(sorted(folders), names, strict=True))


def wordnet_ids() -> list[str]:
    """Return the WordNet ids of ImageNet-1k's classes in label order, which is their own."""
    return (resources.files(_CLASSES) / "classes" / "imagenet-wordnet-ids.txt").read_text(encoding="utf-8").split()


def _open_clip(name: str) -> Sequence[Any]:
    try:
        metadata = importlib.import_module("open_clip.zero_shot_metadata")
    except ImportError as problem:
        raise UserError(_not_installed("open_clip")) from problem
    found: Sequence[Any] = getattr(metadata, _OPEN_CLIP[name])
    return found


def _clip_benchmark(file: str, name: str) -> list[str]:
    """Read the library's data; its code, with all that it imports, is not needed."""
    try:
        path = resources.files("clip_benchmark") / "datasets" / file
    except ImportError as problem:
        raise UserError(_not_installed("clip_benchmark")) from problem
    lists: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    if name not in lists:
        raise UserError(f"clip_benchmark has no {name!r} in {file}; it has {', '.join(lists)}.")
    return lists[name]


def _not_installed(library: str) -> str:
    return f"Class names or templates come from {library}, which is not installed: pip install 'sail-align[eval]'."
