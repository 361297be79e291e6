"""Opening a data set of the library `datasets` as the manifest describes it, and nothing else that its files name."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sail_align.extract.errors import UserError, import_extra, listing
from sail_align.extract.sources.file_set import Fence, FileSet, is_inside
from sail_align.extract.sources.hugging_face_rows import LoadedRows, ParquetRows, Rows
from sail_align.extract.system.files import read_json, read_regular
from sail_align.extract.system.yaml_files import require_few_values

if TYPE_CHECKING:
    from sail_align.extract.sources.hugging_face import HuggingFaceConfig

_SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote."""
_CARDS = ("README.md", ".huggingface.yaml")
"""Files in which a folder may name its data files."""
_OTHER_SPLITS = ("NonMatchingSplitsSizesError", "ExpectedMoreSplitsError", "UnexpectedSplitsError")
"""Errors of the library about a card whose splits are not those of the files."""
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".arrow": ("arrow", {}),
}
"""Reader of the library, and its options, by the ending of a data file."""
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


class CannotStreamError(UserError):
    """A data set is not of parquet files."""


def import_datasets() -> Any:
    """Import the library. Raises `UserError` if it is not installed."""
    return import_extra("datasets", "This source needs the package datasets: pip install 'sail-align[datasets]'.")


def split_names(folder: Path) -> list[str]:
    """Return the names of the splits of a folder that the library can read.

    Raises:
        UserError: The library is not installed, or cannot read the folder.
    """
    datasets = import_datasets()
    _require_inside(folder)
    try:
        if was_saved(folder):
            found = datasets.load_from_disk(str(folder))
            return list(found) if isinstance(found, datasets.DatasetDict) else [str(found.split or "train")]
        return [str(name) for name in datasets.get_dataset_split_names(str(folder))]
    except Exception as problem:  # the library raises errors of any kind
        raise _cannot_open(folder, problem) from problem


def open_rows(config: "HuggingFaceConfig", data_root: Path) -> Rows:
    """Open the split of a data set.

    Raises:
        UserError: The library is not installed, or the data set or the split does not exist, cannot be read, or cannot
            be streamed.
    """
    datasets, folder = import_datasets(), data_root / config.root
    if not config.name and was_saved(folder):
        if not config.allow_outside:
            _require_inside(folder)
        return LoadedRows(_load_saved(datasets, config, folder))
    where, options = _arguments(datasets, config, folder, data_root)
    try:
        if not config.streaming:
            return LoadedRows(datasets.load_dataset(where, config.config, split=config.split, **options))
        builder = datasets.load_dataset_builder(where, config.config, **options)
    except Exception as problem:  # the library raises errors of any kind
        raise _cannot_open(config.name or folder, problem) from problem
    reader = type(builder).__module__.rpartition(".")[2]
    if reader != "parquet":
        raise CannotStreamError(
            f"Data set {config.name or folder} cannot be streamed: got the format {reader!r}, expected parquet. Remove "
            "`streaming: true`, or use the kind table, webdataset, images or class-folder."
        )
    files = {str(split): names for split, names in builder.config.data_files.items()}
    if config.split not in files:
        raise UserError(f"{config.name or folder} has no split {config.split!r}. Its splits are {listing(files)}.")
    root = data_folder(config, data_root)
    names = _short_names([str(file) for file in files[config.split]], root)
    rows = ParquetRows(FileSet(root), names, builder.info.features, datasets.Features.from_arrow_schema)
    stated = None if config.name else (builder.info.splits or {}).get(config.split)
    if stated and stated.num_examples and stated.num_examples != (found := rows.span(rows.stretches()[-1]).stop):
        raise _other_splits(folder, f"{stated.num_examples:,} rows of {config.split!r}, got {found:,}")
    return rows


def data_folder(config: "HuggingFaceConfig", data_root: Path) -> Path:
    """Return the folder of a data set. `root` may be a file in it."""
    root = data_root / config.root
    return root.parent if root.is_file() else root


def _arguments(datasets: Any, config: "HuggingFaceConfig", folder: Path, data_root: Path) -> tuple[str, dict[str, Any]]:
    """Return the name or folder of the data set, or the reader of its data files, and the options of `load_dataset`."""
    options: dict[str, Any] = {"revision": config.revision, "cache_dir": str(datasets.config.HF_DATASETS_CACHE)}
    files = config.files_of_split
    if config.name:
        _require_hub_name(datasets, config.name)
        for pattern in files:
            if (
                "://" in pattern
                or pattern.startswith("/")
                or not is_inside(Path("/repository"), f"/repository/{pattern}")
            ):
                raise UserError(f"Data file {pattern!r} is invalid: expected a path in {config.name}. Correct it.")
        return config.name, options | ({"data_files": {config.split: files}} if files else {})
    # Without a network, `load_dataset` takes a copy of a local folder for the data set of that name on the hub.
    options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / "folders")
    if folder.is_file():
        names = [os.path.abspath(folder)]
    elif files:
        names = _find(files, folder, Fence(data_root, config.allow_outside))
    else:
        if not config.allow_outside:
            _require_inside(folder)
        return str(folder), options
    reader, more = _format_of(names)
    patterns = [name if "://" in name else glob.escape(name) for name in names]
    return reader, options | more | {"data_files": {config.split: patterns}}


def _find(patterns: Sequence[str], folder: Path, fence: Fence) -> list[str]:
    """Return the paths and URLs of the data files that the patterns match."""
    for pattern in patterns:
        if "://" not in pattern:
            fence.path(folder, pattern)
    files = FileSet(folder)
    try:
        names = files.find(patterns)
    except UserError as problem:
        raise UserError(str(problem).replace("source.files", "source.data_files")) from problem
    return [os.path.abspath(path) if (path := files.local(name)) else name for name in names]


def _format_of(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    found = {}
    for name in names:
        endings = Path(name.partition("?")[0]).suffixes
        ending = next((each.lower() for each in reversed(endings) if each.lower() not in _COMPRESSED), "")
        if ending not in FORMATS:
            raise UserError(
                f"Data file {name} is invalid: got the ending {ending!r}, expected {listing(FORMATS)}. Name the folder "
                "of other files in source.root."
            )
        found[ending] = name
    if len({FORMATS[ending][0] for ending in found}) > 1 or (".tsv" in found and ".csv" in found):
        raise UserError(f"Data files are invalid: got {listing(found.values())}, expected one format. Correct them.")
    return FORMATS[next(iter(found))]


def _short_names(names: Sequence[str], root: Path) -> dict[str, str]:
    """Return the names of data files by their paths in the folder or repository, or by themselves elsewhere."""
    folders = [re.escape(os.path.abspath(folder).rstrip("/")) + "/" for folder in (root, root.resolve())]
    before = re.compile("|".join([*folders, "hf://datasets/[^@]+@[^/]+/"]))
    short = {name[found.end() :] if (found := before.match(name)) else name: name for name in names}
    return short if len(short) == len(names) else {name: name for name in names}


def was_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in _SAVED)


def _load_saved(datasets: Any, config: "HuggingFaceConfig", folder: Path) -> Any:
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as problem:  # the library raises errors of any kind
        raise _cannot_open(folder, problem) from problem
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise UserError(f"{folder} has no split {config.split!r}. Its splits are {', '.join(found)}.")
        return found[config.split]
    if found.split is not None and str(found.split) != config.split:
        raise UserError(f"{folder} is the split '{found.split}', but the manifest names {config.split!r}.")
    return found


def _cannot_open(where: object, problem: Exception) -> UserError:
    if isinstance(problem, UserError):
        return problem
    text = " ".join(str(problem).split()).rstrip(".")
    # A partial download: the card has another number of rows, or lists splits whose files are not there.
    if type(problem).__name__ in _OTHER_SPLITS or "Couldn't infer the same data file format for all splits" in text:
        return _other_splits(where, text)
    return UserError(f"Data set {where} cannot be opened: {text}.")


def _other_splits(where: object, details: str) -> UserError:
    return UserError(
        f"Data set {where} cannot be opened: the splits of its card differ from its files ({details}). Download the "
        "rest, correct the card (README.md), or give the folder that has the data files instead of the one with the "
        "card."
    )


def _require_hub_name(datasets: Any, name: str) -> None:
    """Raise `UserError` for a name with which `load_dataset` would read the current folder instead of the hub."""
    formats = getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ())
    if name in formats or Path(name).exists():
        raise UserError(
            f"Name {name!r} is that of a format or of a file here, not of a data set on the hub. For a folder, write "
            "`root` instead of `name`."
        )


def _require_inside(folder: Path) -> None:
    """Raise `UserError` if the card of a folder names files outside the folder or at URLs."""
    for card in (folder / name for name in _CARDS if (folder / name).is_file()):
        text = read_regular(card).decode(errors="replace")
        if card.suffix == ".md":
            _, *front = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
            text = front[0] if front else ""
        try:
            require_few_values(text, card)
            about = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as problem:
            raise UserError(f"{card} is invalid: its metadata are not YAML. Correct or remove it.") from problem
        waiting = [about.get("configs")] if isinstance(about, dict) else []
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str) and ("://" in value or not is_inside(folder, value)):
                raise _names_outside(card, value)
    if was_saved(folder):
        _require_saved_inside(folder)


def _require_saved_inside(folder: Path) -> None:
    """Raise `UserError` if a folder that `save_to_disk` wrote names files outside it, or has a FIFO or device in it."""
    splits_file = folder / _SAVED[0]
    folders = [folder]
    if splits_file.is_file():
        splits = read_json(splits_file).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if outside := [name for name in names if not is_inside(folder, name)]:
            raise _names_outside(splits_file, outside[0])
        folders += [folder / name for name in names]
    for each in folders:
        state = each / _SAVED[1]
        files = read_json(state).get("_data_files") if state.is_file() else None
        for file in files if isinstance(files, list) else []:
            name = file.get("filename") if isinstance(file, dict) else None
            if isinstance(name, str) and not is_inside(each, name):
                raise _names_outside(state, name)
        for path in each.iterdir() if each.is_dir() else ():
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is invalid: it is not a regular file. Remove it.")


def _names_outside(file: Path, name: str) -> UserError:
    return UserError(
        f"{file} names {name[:200]!r}, outside its folder. Correct it, or write `allow_outside: true` in the "
        "manifest's source if you trust it."
    )
