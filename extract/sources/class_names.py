"""Class names and prompt templates, by reference to where they are published.

A reference is `open_clip:<list>`, `clip_benchmark:<data set>`, or the name of a table of labels that comes with the
project. The two libraries belong to the extra `eval` and are imported when a reference is resolved.
"""

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError, import_extra
from sail_align.extract.system.files import read_json

LIBRARIES = ("open_clip:", "clip_benchmark:")
"""Prefixes of references to a list in a library."""
_TEMPLATES = {"imagenet-80": "OPENAI_IMAGENET_TEMPLATES", "imagenet-7": "SIMPLE_IMAGENET_TEMPLATES"}
_NOT_INSTALLED = "Class names or templates of {} need a package: pip install 'sail-align[eval]'."


def class_names(reference: str) -> list[str]:
    """Return a published list of class names, such as `open_clip:imagenet` (OpenAI's 1,000), in label order.

    Raises:
        UserError: The list does not exist, or its library is not installed.
    """
    match reference.split(":", 1):
        case ["open_clip", "imagenet"]:
            return list(_open_clip("IMAGENET_CLASSNAMES"))
        case ["clip_benchmark", name]:
            return list(_clip_benchmark("en_classnames.json", name))
    raise UserError(f"Class names {reference!r} are unknown. Use open_clip:imagenet or clip_benchmark:<data set>.")


def templates(reference: str) -> list[str]:
    """Return published prompt templates, each with one `{}` for the class name.

    `open_clip:imagenet-80` is OpenAI's list for ImageNet, `open_clip:imagenet-7` their short one, and
    `clip_benchmark:<data set>` a list of LAION's benchmark.

    Raises:
        UserError: The list does not exist, or its library is not installed.
    """
    match reference.split(":", 1):
        case ["open_clip", "imagenet-80" | "imagenet-7" as name]:
            return [template("{}") for template in _open_clip(_TEMPLATES[name])]
        case ["clip_benchmark", name]:
            found = _clip_benchmark("en_zeroshot_classification_templates.json", name)
            return [template.replace("{c}", "{}") for template in found]
    raise UserError(
        f"Templates {reference!r} are unknown. Use open_clip:imagenet-80, open_clip:imagenet-7 or "
        "clip_benchmark:<data set>."
    )


def label_names(name: str) -> dict[int, str]:
    """Return a packaged table of labels, such as `ade20k-150`: names without synonyms, by label.

    Raises:
        UserError: The table does not exist.
    """
    folder = resources.files("sail_align.data_manifests") / "classes"
    if not (path := folder / f"{name}.tsv").is_file():
        stems = sorted(entry.name[:-4] for entry in folder.iterdir() if entry.name.endswith(".tsv"))
        raise UserError(f"Table of labels {name!r} is unknown. Use a mapping, or one of: {', '.join(stems)}.")
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    return {int(row["label"]): row["name"] for row in rows}


def _open_clip(name: str) -> Sequence[Any]:
    metadata = import_extra("open_clip.zero_shot_metadata", _NOT_INSTALLED.format("open_clip"))
    found: Sequence[Any] = getattr(metadata, name)
    return found


def _clip_benchmark(file: str, name: str) -> list[str]:
    """Read a data file of the library without importing its code, which is slow to import."""
    try:
        folder = resources.files("clip_benchmark")
    except ImportError as problem:
        raise UserError(_NOT_INSTALLED.format("clip_benchmark")) from problem
    lists: dict[str, list[str]] = read_json(Path(str(folder / "datasets" / file)), "reinstall clip-benchmark")
    if name not in lists:
        raise UserError(f"clip_benchmark has no {name!r} in {file}. Its lists are {', '.join(lists)}.")
    return lists[name]
