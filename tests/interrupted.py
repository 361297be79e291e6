"""Small index files, and processes that are killed while they write them."""

import os
import signal
from pathlib import Path

from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import build_index, index, recaptions
from sail_align.extract.store.open_or_create import open_or_create
from sail_align.extract.store.store import Store


class Killed(BaseException):
    """Simulates SIGKILL without the cost of a process."""


def shrink(set_attribute=setattr):
    """Make index files of 32 rows in groups of 8."""
    for module in (index, build_index, recaptions):
        for name, value in {"FILE_ROWS": 32, "GROUP_ROWS": 8}.items():
            if hasattr(module, name):
                set_attribute(module, name, value)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def die_at_write(left: int) -> None:
    """Kill this process before it opens a file for writing or renames one after `left` such operations."""

    def dying(method):
        def wrapper(self, *args, **kwargs):
            nonlocal left
            left -= method.__name__ == "replace" or bool({"wb", "xb"} & set(args))
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(self, *args, **kwargs)

        return wrapper

    Path.open, Path.replace = dying(Path.open), dying(Path.replace)


def open_pictures(root: Path, out: str = "s.zarr") -> Store:
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    return open_or_create(root / out, manifest, manifest.open_source(data_root), quiet=True)


def open_and_die(root: Path, out: str, writes: int) -> None:
    """Open a store with small index files, and kill this process after so many writes."""
    die_at_write(writes)
    shrink()
    open_pictures(root, out)
