"""Leases: which process may write what, agreed on through files alone, so that it works between machines too.

A lease is a small file, `<name>.<generation>.json`; the highest generation counts. It is created whole and exclusively,
grows by a byte with each heartbeat, and is removed when its work is done. A dead owner's lease is taken over by
creating the next generation, in which only one of several observers succeeds. Clocks of two machines are never
compared: a lease of another machine is dead if this observer has seen no change of it for `ttl` seconds.

Work under a lease is deterministic and replaces whole files, so a wrong guess costs at most repeated work.
"""

import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import is_remote, read_regular

TTL = 120.0
"""Seconds without a heartbeat, of which there are six in this time, after which a lease of another machine is dead."""

POLL = 1.0
"""Seconds between two looks at a lease while waiting for it."""

_MAX_PID = 2**31
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.json\.[0-9a-f]{32}\.tmp")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


_UNREMOVED: set[bytes] = set()
"""Contents of leases that this process has released, but whose files it could not remove. They are dead."""


class LeaseLostError(Exception):
    """Another process has taken the lease over, because this one sent no heartbeat for too long."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        machine: The host since its last boot, and the container on it.
        pid: Process id.
        start: Start of the process in clock ticks since boot; "" if unknown. Unlike psutil's `create_time`, it does not
            change when the system's clock is set.
    """

    machine: str
    pid: int
    start: str

    @classmethod
    def current(cls) -> "Owner":
        """Return this process."""
        return cls(_machine(), os.getpid(), _start_of(os.getpid()))

    @classmethod
    def parse(cls, content: bytes) -> "Owner | None":
        """Return the owner named in a lease's content, None if it is damaged, as by a full disk or a crash."""
        try:
            record = json.loads(content.split(b"\n")[0])
            machine, pid, start = record["machine"], record["pid"], record["start"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        is_process = type(pid) is int and 0 < pid < _MAX_PID
        return cls(machine, pid, start) if is_process and isinstance(machine, str) and isinstance(start, str) else None

    def is_alive(self) -> bool | None:
        """Return whether the process is running, None if this machine cannot tell."""
        if self.machine != _machine() or not self.start:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # a process of another user
            return True
        return _start_of(self.pid) == self.start


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """Return the start of a process in clock ticks since boot, "" if it has ended or there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # proc(5): Z and X are dead processes; field 22 is the start


class Lease:
    """The right to write one thing, until it is released."""

    def __init__(self, path: Path, generation: int):
        self.path = path
        self.generation = generation
        self.content = json.dumps({**asdict(Owner.current()), "token": uuid.uuid4().hex}).encode() + b"\n"
        self.file = self.file_of(path, generation)
        self._lock = threading.RLock()  # a heartbeat must not write an object that is being removed; signals interrupt

    @staticmethod
    def file_of(path: Path, generation: int) -> Path:
        """Return the file of one generation of a lease."""
        return path.with_name(f"{path.name}.{generation}.json")

    @staticmethod
    def generations(path: Path) -> list[int]:
        """Return the generations of a lease that have a file, in order."""
        try:
            names = [file.name for file in path.parent.iterdir()] if is_remote(path) else os.listdir(path.parent)
        except (FileNotFoundError, NotADirectoryError):
            return []
        pattern = re.compile(re.escape(path.name) + r"\.([0-9]{1,18})\.json")
        return sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))

    @staticmethod
    def newest(path: Path) -> int | None:
        """Return the generation of a lease that counts, None if the lease is free."""
        return max(Lease.generations(path), default=None)

    def confirm(self) -> None:
        """Raise `LeaseLostError` unless this process still has the lease."""
        if self.newest(self.path) != self.generation or not _read(self.file).startswith(self.content):
            raise LeaseLostError(f"lease {self.path} was taken over")

    def create(self) -> bool:
        """Create the file. Returns whether no other process had done so."""
        if is_remote(self.path):
            return self._create_object()
        temporary = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex}.tmp")
        while True:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(self.content)
                os.link(temporary, self.file)
            except FileNotFoundError:
                continue  # another process has just tidied up
            except FileExistsError:
                return _read(self.file) == self.content  # a network may lose the answer to a first, successful attempt
            except OSError as problem:
                if problem.errno not in _NO_LINKS:
                    raise
                return self._create_without_link()
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            return True

    def _create_object(self) -> bool:
        """Create an object with a conditional put, such as S3's `If-None-Match`, which only one of its writers wins."""
        file: Any = self.file
        try:
            file.fs.pipe_file(file.path, self.content, mode="create")
        except OSError as problem:
            found = _read(file)  # ours if the client has tried again because an answer was lost
            if not found and not _is_conflict(problem):
                raise
            return found == self.content
        except (TypeError, ValueError, NotImplementedError):  # storage without conditional puts: the last writer wins
            if file.exists():
                return False
            file.write_bytes(self.content)
            return _read(file) == self.content
        return True

    def _create_without_link(self) -> bool:
        try:
            with self.file.open("xb") as file:
                file.write(self.content)
        except FileExistsError:
            return False
        return True

    def renew(self) -> None:
        """Show other processes that the owner is alive. Errors, such as of a lost lease, are reported elsewhere."""
        if is_remote(self.path):
            with self._lock, suppress(Exception):  # a storage client may raise anything; the heartbeat must continue
                if (content := _read(self.file)).startswith(self.content):
                    self.file.write_bytes(content + b".")
            return
        with suppress(OSError), self.file.open("r+b", buffering=0) as file:  # unlike "ab", it creates no lost lease
            file.seek(0, os.SEEK_END)
            file.write(b".")

    def remove(self) -> None:
        """Remove the file after those of earlier generations, unless the lease is lost."""
        with self._lock:
            if not _read(self.file).startswith(self.content):
                return
            for generation in [*(g for g in self.generations(self.path) if g < self.generation), self.generation]:
                try:
                    self.file_of(self.path, generation).unlink(missing_ok=True)
                except OSError:
                    _UNREMOVED.add(self.content)


class Leases:
    """The leases of one store, as this process holds and observes them."""

    def __init__(self, folder: Path, ttl: float = TTL):
        self.folder = folder
        self.ttl = ttl
        self._held: set[Lease] = set()
        self._closed = False
        self._lock = threading.RLock()  # a signal may interrupt its holder
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._heart: threading.Thread | None = None

    def take(self, name: str) -> Lease | None:
        """Return the lease of this name, None if another process (or this one) has it and is alive.

        The work may have been done in the meantime: check again after taking the lease.

        Raises:
            UserError: The store's folder has disappeared. It must not be created again: if a disk was unmounted, the
                work would go to the disk below. Or the folder of leases is a link.
        """
        if not is_remote(self.folder):
            if not self.folder.parent.is_dir():
                raise UserError(f"{self.folder.parent} has disappeared. Restore it and rerun the same command.")
            if self.folder.is_symlink():
                raise UserError(f"{self.folder} is a link, which a store never contains. Remove it.")
        path = self.folder / name
        newest = Lease.newest(path)
        if newest is not None and not self._is_dead(Lease.file_of(path, newest)):
            return None
        lease = Lease(path, 0 if newest is None else newest + 1)
        with self._lock:
            if self._closed:
                return None
            self._held.add(lease)  # before creating it, so that a signal in between leaves nothing behind
            created = lease.create()
        # An observer that slept after its look may come here long after another one has taken the lease over.
        stale = newest is not None and not Lease.file_of(path, newest).exists()
        if not created or stale or self._closed or Lease.newest(path) != lease.generation:
            self.release(lease)
            return None
        with self._lock:
            if self._heart is None:
                self._heart = threading.Thread(target=self._renew_held, name="leases", daemon=True)
                self._heart.start()
        return lease

    def release(self, lease: Lease) -> None:
        """Release a lease. A lost lease is left to its new owner."""
        lease.remove()
        with self._lock:
            self._held.discard(lease)

    def release_all(self) -> None:
        """Release all leases of this process and remove empty folders."""
        for lease in list(self._held):
            self.release(lease)
        self.tidy()

    def close(self) -> None:
        """Release all leases and take no more, as another thread may be about to."""
        with self._lock:
            self._closed = True
        self.release_all()

    @contextmanager
    def hold(self, name: str, waiting: Callable[[], object] | None = None) -> Iterator[Lease]:
        """Hold a lease during the block. If another process has it, call `waiting` once and wait.

        Raises:
            LeaseLostError: Another process has the lease, and there is no `waiting`.
        """
        lease = self.take(name)
        if lease is None:
            if waiting is None:
                raise LeaseLostError(name)
            waiting()
        while lease is None:
            time.sleep(POLL)
            lease = self.take(name)
        try:
            yield lease
        finally:
            self.release(lease)
            if waiting is not None:
                self.tidy()

    def names(self) -> set[str]:
        """Return the names of all leases that have a file, whether their owners are dead or alive."""
        if is_remote(self.folder):
            files = [file.as_posix() for file in self.folder.rglob("*.json")]
        else:
            files = [f"{folder}/{file}" for folder, _, files in os.walk(self.folder) for file in files]
        start = len(self.folder.as_posix()) + 1
        return {file[start:].rsplit(".", 2)[0] for file in files if file.endswith(".json")}

    def remove(self, name: str) -> None:
        """Remove a lease on finished work, unless its owner is alive on this machine and may be repeating the work."""
        if self.is_held_here(name):
            return
        path = self.folder / name
        for generation in Lease.generations(path):
            with suppress(OSError):
                Lease.file_of(path, generation).unlink(missing_ok=True)

    def remove_dead(self, name: str) -> None:
        """Remove a lease if its owner was a process of this machine and has ended."""
        owner = self._owner(name)
        if owner is not None and owner.is_alive() is False:
            self.remove(name)

    def is_held(self, name: str) -> bool | None:
        """Return whether a live process has the lease of this name, None if it is one of another machine."""
        owner = self._owner(name)
        return owner.is_alive() if owner else False

    def is_held_here(self, name: str) -> bool:
        """Return whether a live process of this machine has the lease of this name."""
        return self.is_held(name) is True

    def _owner(self, name: str) -> Owner | None:
        newest = Lease.newest(self.folder / name)
        return None if newest is None else Owner.parse(_read(Lease.file_of(self.folder / name, newest)))

    def tidy(self) -> None:
        """Remove temporary files of killed processes, and empty folders. Links are not followed."""
        if is_remote(self.folder) or self.folder.is_symlink():
            return
        for folder, _, files in os.walk(self.folder, topdown=False):
            for leftover in (Path(folder, file) for file in files if _TEMPORARY.fullmatch(file)):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or already removed
                os.rmdir(folder)

    def _is_dead(self, file: Path) -> bool:
        content = _read(file)
        if any(content.startswith(each) for each in _UNREMOVED):
            return True
        owner = Owner.parse(content)
        alive = owner.is_alive() if owner else None
        if alive is not None:
            return not alive
        before, since = self._seen.get(file, (None, 0.0))
        if content != before:
            self._seen[file] = content, time.monotonic()
            return False
        return time.monotonic() - since > self.ttl

    def _renew_held(self) -> None:
        while True:
            time.sleep(self.ttl / 6)
            with self._lock:
                held = list(self._held)
                if not held:  # end the thread: a process may open any number of stores
                    self._heart = None
                    return
            for lease in held:
                lease.renew()


def _is_conflict(problem: OSError) -> bool:
    """Return whether a conditional put failed because another process created or removed the object meanwhile.

    These are the answers 412 and 409, of which s3fs turns only some into a `FileExistsError`.
    """
    codes = ("PreconditionFailed", "ConditionalRequestConflict")
    return isinstance(problem, FileExistsError) or any(code in str(problem.__cause__) for code in codes)


def _read(file: Path) -> bytes:
    try:
        return read_regular(file)
    except FileNotFoundError:
        return b""
    except OSError as problem:
        if problem.errno in (errno.EINVAL, errno.EISDIR):  # not a file: planted, and as good as damaged
            return b""
        raise
