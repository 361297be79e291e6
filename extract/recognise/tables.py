"""Recognition of tables that name images and hold captions."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.errors import UserError, listing
from sail_align.extract.recognise.columns import (
    MOST_VALUES,
    Choices,
    Columns,
    UndecidedError,
    Understood,
    all_columns,
    choose_captions,
    name_captions,
)
from sail_align.extract.recognise.places import best_folder, folders_near, relative_to, sample
from sail_align.extract.sources.delimited import decode
from sail_align.extract.sources.hugging_face import holds_images
from sail_align.extract.sources.images import begins_like_image, image_endings
from sail_align.extract.sources.table_files import read_batches, text_columns
from sail_align.extract.system.files import open_regular, require_regular
from sail_align.extract.system.validation import shortened

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
PROBED_BYTES = 1 << 20
"""Bytes of a table by which its encoding is guessed."""
PROBED_IMAGES = 8
"""Rows of a column of bytes among which the first that is not empty is looked at."""
MOST_COMPARED = 3
"""Names of missing images that are compared with those of all files."""
LONGEST_NAME = 1_000
MOST_ROWS = 1 << 18
"""Rows among which an image that is named twice is looked for."""
_USUAL_IMAGE = re.compile(r"(image|img|file|photo|picture)[ _-]?(file)?[ _-]?(name|path)?|filename|filepath|path")
_SPLITS = {"train", "val", "valid", "validation", "test", "dev", "restval"}


def recognise_tables(files: Sequence[Path], choices: Choices) -> Understood:
    """Return how to read tables of the same columns.

    Raises:
        UserError: The tables cannot be read, have no rows or name no images that are there, or a choice does not fit.
        UndecidedError: The user has to name a column.
    """
    first = files[0]
    encoding = _guess_encoding(first)
    columns = _read_columns(first, encoding)
    image, folder = _find_images(first, columns, choices)
    if image.lower().endswith(tuple(image_endings())):
        raise UserError(
            f"{first} has no row of column names: it begins with {image!r}. Add one, such as image,caption."
        )
    others = {name: values for name, values in columns.items() if name != image}
    chosen = choose_captions({name: v for name, v in others.items() if not _holds_urls(v)}, choices, first)
    if not chosen:
        raise UndecidedError(
            f"No column of {first} looks like captions. {all_columns(others)} Pass "
            f"--caption-columns, or give the folder of the images, {folder}, to read these alone."
        )
    repeated = _repeated_images(files, image, encoding)
    lists = [name for name in chosen if any(isinstance(value, list) for value in columns[name])]
    if len(chosen) > 1 and (repeated or lists):
        why = f"{lists[0]!r} has lists of captions" if lists else f"image {shortened(repeated)} is in several rows"
        raise UndecidedError(
            f"{first} may have only one column of captions, because {why}. Pass --caption-columns with one of: "
            f"{listing(chosen)}."
        )
    root = first.parent
    source: dict[str, object] = {
        "kind": "table",
        "files": [file.name for file in files] if len(files) > 1 else first.name,
        "images": relative_to(folder, root),
        "image": image,
        "captions": chosen[0] if repeated or lists else name_captions(chosen),
    }
    if urls := [name for name, values in others.items() if _holds_urls(values)]:
        source["url"] = urls[0]
    unused = [name for name in columns if name not in {image, *chosen, *urls[:1]}]
    notes = [f"columns not used: {listing(unused)}"] if unused else []
    hints = []
    for name in unused:
        if counts := _split_counts(columns[name]):
            counted = ", ".join(f"{value} ({count})" for value, count in counts.most_common())
            notes.append(f"column {name!r} may be a split: of the first rows, {counted}. All rows are used")
            hints.append(f"  split: {{column: {name}, keep: {counts.most_common(1)[0][0]}}}   # use only these rows")
    if encoding:
        source["encoding"] = encoding
        notes.append(
            f"the table is not UTF-8 and is read as {encoding}. If texts look wrong, set another `encoding` in the "
            "manifest"
        )
    table = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSONL", ".parquet": "parquet"}[first.suffix.lower()]
    tables = f"a {table} table" if len(files) == 1 else f"{len(files):,} {table} tables"
    what = f"{tables} of images in {folder}"
    return Understood(what, root, source, notes=notes, hints=hints)


def has_image_bytes(file: Path) -> bool:
    """Return whether a parquet file contains its images, as the library `datasets` and img2dataset store them."""
    try:
        with pq.ParquetFile(require_regular(file), pre_buffer=False) as opened:
            columns = [each for each in opened.schema_arrow if holds_images(each.type)]
            if any(pa.types.is_struct(each.type) for each in columns):
                return True
            for column in columns:  # of bytes, which may be texts
                rows = next(opened.iter_batches(PROBED_IMAGES, columns=[column.name]), None)
                value = next(filter(None, rows.column(0).to_pylist()), None) if rows else None
                if value and begins_like_image(value):
                    return True
    except (OSError, ValueError):  # pyarrow's errors are subclasses
        pass
    return False


def _guess_encoding(file: Path) -> str | None:
    """Return the encoding of a CSV or TSV that is not UTF-8: the usual one of Windows. None for any other table."""
    if file.suffix.lower() not in (".csv", ".tsv"):
        return None
    with open_regular(file) as content:
        start = content.read(PROBED_BYTES)
    text = decode(start)
    others = any(character > "\x7f" and character != "\ufffd" for character in text)
    return None if others or "\ufffd" not in text else "cp1252"


def _read_columns(file: Path, encoding: str | None) -> Columns:
    """Return the first values of the columns of texts."""
    names = text_columns(file, encoding)
    if not names:
        raise UserError(f"{file} has no column of texts. Expected the images' paths and captions.")
    batch = next(read_batches(file, names, (), None, encoding), None)
    if batch is None or not len(batch):
        raise UserError(f"{file} has no rows. Expected an image and a caption in each.")
    return {name: batch[name].to_pylist() for name in names}


def _find_images(file: Path, columns: Columns, choices: Choices) -> tuple[str, Path]:
    """Return the column whose values are images, and the folder they are in.

    Raises:
        UserError: A choice does not fit the table, or no column names images that are there.
        UndecidedError: Several columns do.
    """
    chosen = choices.image_column
    if chosen is not None and chosen not in columns:
        raise UserError(f"--image-column is invalid: {file} has no column {chosen!r}. {all_columns(columns)}")
    if choices.images is not None and not choices.images.is_dir():
        raise UserError(f"--images is invalid: {choices.images} is not a folder.")
    considered = {chosen: columns[chosen]} if chosen else columns
    names = {column: _file_names(values) for column, values in considered.items()}
    folders = [choices.images] if choices.images else list(folders_near(file))
    found = {column: best_folder(values, folders) for column, values in names.items() if values}
    share = {column: hits / len(names[column]) for column, (hits, _) in found.items() if hits}
    if not share:
        raise UserError(_describe_no_images(file, columns, names, folders, choices))
    best = [column for column in share if share[column] >= max(share.values()) / 2]
    if len(best) > 1:
        usual = [column for column in best if _USUAL_IMAGE.fullmatch(column.lower())]
        if len(usual) != 1:
            raise UndecidedError(
                f"{file} has several columns that name images: {listing(best)}. Pass one of them, such as "
                f"--image-column {best[0]}."
            )
        best = usual
    return best[0], found[best[0]][1]


def _describe_no_images(
    file: Path, columns: Columns, names: dict[str, list[str]], folders: Sequence[Path], choices: Choices
) -> str:
    where = choices.images or f"{file.parent} and the folders near it"
    endings = tuple(image_endings())
    named = {column: values for column, values in names.items() if any(v.lower().endswith(endings) for v in values)}
    for column, values in named.items() or names.items():
        if best_folder([value.replace("\\", "/") for value in values], folders)[0]:
            return f"Column {column!r} of {file} has backslashes in paths, such as {values[0]!r}. Write / instead."
        if found := _in_another_case(values, folders):
            name, path = found
            return (
                f"Column {column!r} of {file} names images in another case: {name!r} is {path.name!r} in "
                f"{path.parent}. Correct the table."
            )
        for ending in endings:
            if column not in named and best_folder([f"{value}{ending}" for value in values], folders)[0]:
                return (
                    f"Column {column!r} of {file} names images without their ending: {values[0]!r} instead of "
                    f"{values[0] + ending!r}. Add it to the table."
                )
    if named:
        column, values = next(iter(named.items()))
        return (
            f"No image of column {column!r} of {file} is in {where}; the first is {values[0]!r}. Pass the folder of "
            "the images with --images."
        )
    if urls := [column for column, values in columns.items() if _holds_urls(values)]:
        return (
            f"{file} has addresses of images in column {urls[0]!r}, and no column of image files. Download them first "
            "(img2dataset, or `download` in a manifest, see docs/data.md) and give the folder of the tars."
        )
    return f"No column of {file} names images in {where}. {all_columns(columns)} Pass --image-column and --images."


def _in_another_case(names: Sequence[str], folders: Sequence[Path]) -> tuple[str, Path] | None:
    """Return a name that is a file in another case, and this file."""
    for folder in folders:
        for name in names[:MOST_COMPARED]:
            place = folder / name
            if place.parent.is_dir():
                for entry in place.parent.iterdir():
                    if entry.name.lower() == place.name.lower():
                        return name, entry
    return None


def _file_names(values: Iterable[object]) -> list[str]:
    """Return some of the texts that may be names of files."""
    texts = [value for value in values if isinstance(value, str)]
    return sample([text for text in texts if text.strip() and "://" not in text and len(text) < LONGEST_NAME])


def _repeated_images(files: Sequence[Path], image: str, encoding: str | None) -> str | None:
    """Return the first image that is in several rows; None if there is none among the first rows."""
    seen: set[str] = set()
    rows = (
        name
        for file in files
        for batch in read_batches(file, [image], [image], None, encoding)
        for name in batch[image].to_pylist()
    )
    for name in islice(rows, MOST_ROWS):
        if name in seen and name:
            return str(name)
        seen.add(name)
    return None


def _texts(values: Iterable[object]) -> list[str]:
    listed = chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    return [text for text in listed if isinstance(text, str)]


def _holds_urls(values: Sequence[object]) -> bool:
    filled = [text for text in _texts(values) if text.strip()][:MOST_VALUES]
    return bool(filled) and 2 * sum("://" in text for text in filled) > len(filled)


def _split_counts(values: Sequence[object]) -> Counter[str]:
    """Return how often each split is named by a column of splits; nothing for any other column."""
    counts = Counter(text for text in _texts(values) if text)
    return counts if len(counts) > 1 and {name.lower() for name in counts} <= _SPLITS else Counter()
