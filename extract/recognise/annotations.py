"""Recognition of annotation files in JSON: COCO's captions and Karpathy's splits."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sail_align.extract.errors import UserError, listing
from sail_align.extract.recognise.columns import Choices, Understood
from sail_align.extract.recognise.places import best_folder, folders_near, relative_to, sample
from sail_align.extract.system.files import read_json

_REMEDY = "give a table (JSONL, CSV), or COCO's or Karpathy's annotations"


def recognise_annotations(file: Path, choices: Choices) -> Understood:
    """Return how to read an annotation file.

    Raises:
        UserError: The file has another form, its images are not there, or a choice does not fit it.
    """
    choices.require_unused(("--image-column", "--caption-columns"), f"{file} has no columns")
    content = read_json(file, _REMEDY)
    images = content.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(image, Mapping) for image in images):
        raise UserError(f"{file} has an unknown form: got no list of 'images'; {_REMEDY}.")
    if "sentences" in images[0]:
        return _recognise_karpathy(file, images, choices)
    annotations = content.get("annotations")
    if not isinstance(annotations, list) or not any(isinstance(a, Mapping) and "caption" in a for a in annotations):
        raise UserError(f"{file} has no captions in its 'annotations'; {_REMEDY}.")
    folder = _find_images(file, [str(image.get("file_name")) for image in images], choices)
    source = {"kind": "coco-captions", "annotations": file.name, "images": relative_to(folder, file.parent)}
    return Understood(f"COCO captions of images in {folder}", file.parent, source)


def _recognise_karpathy(file: Path, images: list[Any], choices: Choices) -> Understood:
    splits = Counter(str(image.get("split")) for image in images)
    split = "train" if "train" in splits else splits.most_common(1)[0][0]
    names = [str(PurePosixPath(str(image.get("filepath") or "")) / str(image.get("filename"))) for image in images]
    folder = _find_images(file, names, choices)
    source = {"kind": "karpathy", "annotations": file.name, "images": relative_to(folder, file.parent), "split": split}
    counted = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common())
    notes = [f"splits: {counted}; {split!r} is used. Change `split` in the manifest for another"]
    return Understood(f"Karpathy's captions of images in {folder}", file.parent, source, notes=notes)


def _find_images(file: Path, names: list[str], choices: Choices) -> Path:
    folders = [choices.images] if choices.images else list(folders_near(file))
    found, folder = best_folder(sample(names), folders)
    if not found:
        where = choices.images or f"{file.parent} and the folders near it"
        raise UserError(
            f"No image of {file} is in {where}; the first is {listing(names[:1])!r}. Pass the folder of the images "
            "with --images."
        )
    return folder
