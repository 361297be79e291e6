"""Faults of the file system, injected at the primitives through which Python code changes files.

`Disk` replaces `open`, `os.replace`, `os.fsync`, … in this process. It numbers the operations below a folder and fails
at one of them. A file opened for writing has a raw file of ours below Python's own buffers, so code and libraries that
write to Python files are covered: parquet, safetensors and zarr here write to memory or to such files. A library that
opens a path in C is not; `Disk.files` lists what was seen, so that the harness can refuse files that were not.

Linux only: paths of descriptors are read from /proc.
"""

import builtins
import errno
import io
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

_RANDOM = re.compile(r"[0-9a-f]{32}|(?<=-)(?<!step-)(?<!best-)[0-9a-f]{8}(?=[-./]|$)")

FAULTS = {
    "ENOSPC": "no space is left, from this operation on",
    "EROFS": "the file system is read-only, from this operation on",
    "EIO": "the operation fails with an input/output error, once",
    "EACCES": "permission for the operation is missing",
    "short": "half of the bytes are written, and the call returns their number",
    "kill": "SIGKILL before the operation",
    "torn": "SIGKILL after half of the bytes",
}
OF_WRITES = ("short", "torn")
ALLOCATING = ("create", "write", "close", "fsync", "mkdir", "link", "rename")
ON_PATHS = ("create", "mkdir", "rmdir", "unlink", "link", "rename")
"""Operations that need permission: the others have an open file."""
LASTING = {"ENOSPC": ALLOCATING, "EROFS": (*ALLOCATING, "unlink", "rmdir")}
"""Later operations that fail after a fault: files can be removed from a full disk."""


class Point(NamedTuple):
    """An operation of a job: its kind, its path below the job's folder, and the how-manieth of these it is."""

    operation: str
    path: str
    occurrence: int


class Disk:
    """The file system below a folder, as this process changes it. Install it once, in a process of its own.

    Args:
        root: The folder, absolute and without links.
        point: Operation at which to fail; None to count only.
        fault: One of `FAULTS`.
    """

    def __init__(self, root: str, point: Point | None = None, fault: str = ""):
        self.root = root.rstrip("/") + "/"
        self.points: list[Point] = []
        self.files: set[str] = set()
        self._point, self._fault, self._lasts = point, fault, False
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def install(self) -> None:
        """Replace the primitives of this process."""
        self._open = io.open
        builtins.open = io.open = self._open_file
        os.open = self._around(os.open, self._open_descriptor)
        os.write = self._around(os.write, self._write_descriptor)
        os.fsync = self._around(os.fsync, self._fsync)
        for name, operation in {"mkdir": "mkdir", "rmdir": "rmdir", "unlink": "unlink", "remove": "unlink"}.items():
            setattr(os, name, self._around(getattr(os, name), self._one_path, operation))
        for name, operation in {"replace": "rename", "rename": "rename", "link": "link"}.items():
            setattr(os, name, self._around(getattr(os, name), self._two_paths, operation))

    def reach(self, operation: str, path: str, length: int = 0, named: Any = ()) -> int | None:
        """Count an operation and fail if it is the chosen one.

        Args:
            operation: Its kind.
            path: Absolute path.
            length: Number of bytes to write.
            named: Paths as the caller gave them, which the error names. None for operations on descriptors.

        Returns:
            How many of `length` bytes to write before the fault, None for all and no fault.
        """
        if not path.startswith(self.root):
            return None
        name = without_random(path[len(self.root) :])
        with self._lock:
            self._seen[operation, name] += 1
            point = Point(operation, name, self._seen[operation, name])
            self.points.append(point)
            if operation == "create":
                self.files.add(path)
        if point == self._point:
            if self._fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._fault in OF_WRITES:
                return length // 2
            self._lasts = self._fault in LASTING
        elif not self._lasts or operation not in LASTING[self._fault]:
            return None
        number = getattr(errno, self._fault)
        first, second = (*map(os.fspath, named), None, None)[:2]
        raise OSError(number, os.strerror(number), first, None, second)

    def write_report(self, path: Any) -> None:
        """Write the operations, files and modules of this process to a file elsewhere."""
        names = [name[len(self.root) :] for name in self.files]
        with self._open(path, "w") as file:
            json.dump({"points": self.points, "files": names, "modules": list(sys.modules)}, file)

    @property
    def is_torn(self) -> bool:
        return self._fault == "torn"

    def _open_file(self, file: Any, mode: str = "r", buffering: int = -1, *words: Any, **options: Any) -> Any:
        path = _absolute(file)
        if not path.startswith(self.root) or not set(mode) & set("wxa+"):
            return self._open(file, mode, buffering, *words, **options)
        names = ("encoding", "errors", "newline", "closefd", "opener")
        options = dict(zip(names, words, strict=False)) | options
        raw_options = {name: options.pop(name) for name in ("closefd", "opener") if name in options}
        self.reach("create", path, named=[file])
        raw = _RawFile(path, mode.replace("b", "").replace("t", ""), self, **raw_options)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **options)

    def _around(self, primitive: Callable[..., Any], check: Callable[..., Any], *more: Any) -> Callable[..., Any]:
        def operation(*words: Any, **options: Any) -> Any:
            return check(primitive, *more, *words, **options)

        return operation

    def _open_descriptor(
        self, primitive: Callable[..., Any], path: Any, flags: int, *words: Any, **options: Any
    ) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.reach("create", _absolute(path, options.get("dir_fd")), named=[path])
        return primitive(path, flags, *words, **options)

    def _write_descriptor(self, primitive: Callable[..., Any], descriptor: int, content: Any) -> int:
        part = self.reach("write", _absolute(descriptor), len(content))
        if part is None:
            return int(primitive(descriptor, content))
        written = primitive(descriptor, memoryview(content)[:part])
        if self.is_torn:
            os.kill(os.getpid(), signal.SIGKILL)
        return int(written)

    def _fsync(self, _primitive: Callable[..., Any], descriptor: Any) -> None:
        """Fail, or return without waiting for the disk: a killed process loses nothing that it wrote."""
        self.reach("fsync", _absolute(descriptor if isinstance(descriptor, int) else descriptor.fileno()))

    def _one_path(self, primitive: Callable[..., Any], operation: str, path: Any, *words: Any, **options: Any) -> Any:
        name = _absolute(path, options.get("dir_fd"))
        if operation != "mkdir" or not os.path.lexists(name):  # else it fails anyway
            self.reach(operation, name, named=[path])
        return primitive(path, *words, **options)

    def _two_paths(self, primitive: Callable[..., Any], operation: str, old: Any, new: Any, **options: Any) -> None:
        before, after = _absolute(old, options.get("src_dir_fd")), _absolute(new, options.get("dst_dir_fd"))
        self.reach(operation, after, named=[old, new])
        primitive(old, new, **options)
        self.files |= {after + name[len(before) :] for name in self.files if f"{name}/".startswith(f"{before}/")}


def without_random(path: str) -> str:
    """Return a path with * for random names of temporary files, and for digests, which depend on the inputs' place."""
    return _RANDOM.sub("*", path)


class _RawFile(io.FileIO):
    """An unbuffered file whose writes and whose end are operations of a `Disk`."""

    def __init__(self, path: str, mode: str, disk: Disk, **options: Any):
        super().__init__(path, mode, **options)
        self._disk, self._path = disk, path

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        part = self._disk.reach("write", self._path, len(content))
        written = super().write(content if part is None else content[:part])
        if part is not None and self._disk.is_torn:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open:
            self._disk.reach("close", self._path)


def _absolute(path: Any, folder: int | None = None) -> str:
    """Return the absolute path of a path or a descriptor, "" for the descriptor of no file."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
        return path if path.startswith("/") else ""
    name = os.fsdecode(path)
    if folder is not None:
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)
