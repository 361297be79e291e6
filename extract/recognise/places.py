"""Where the images are that a file names."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from sail_align.extract.sources.file_set import is_inside
from sail_align.extract.sources.images import folders_below

MOST_FOLDERS = 500
"""Folders in which images are looked for, below that of the file and beside it."""
MOST_NAMES = 50
"""Names of images that are looked for in each folder."""


def sample(names: Sequence[str]) -> list[str]:
    """Return some names from all over a list."""
    return list(names[:: max(len(names) // MOST_NAMES, 1)][:MOST_NAMES])


def best_folder(names: Sequence[str], folders: Sequence[Path]) -> tuple[int, Path]:
    """Return how many of the names are files in the folder with most of them, and this folder, the first of several."""
    counts = [(sum(os.path.isfile(folder / name) for name in names if "\0" not in name), folder) for folder in folders]
    return max(counts, key=lambda each: each[0])


def folders_near(file: Path) -> Iterator[Path]:
    """Yield the folders in which the images of a file may be: its own, those below, the one above, those beside."""
    own, above = file.parent, file.parent / os.pardir
    yield from islice((own / name for name in folders_below(own)), MOST_FOLDERS)
    yield above
    try:
        names = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:
        return
    yield from (above / name for name in names[:MOST_FOLDERS])


def relative_to(folder: Path, root: Path) -> str:
    """Return the path of a folder from a root, or its absolute path unless it is below or beside the root."""
    path, base = folder.resolve(), root.resolve()
    near = is_inside(base.parent, str(path))
    return Path(os.path.relpath(path, base)).as_posix() if near else path.as_posix()
