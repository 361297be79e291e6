"""Leases: which process may write what, agreed on through files alone, so that it holds between machines too.

A lease is a small file, `<name>.<generation>.json`; the highest generation is the one that counts. It is created whole
and exclusively, grows by a byte with each heartbeat, and goes when its work is done. A dead owner's lease is taken over
by creating the next generation, which only one of several observers can do. Clocks of two machines are never compared:
a lease of another machine is dead when this observer has seen no change of it for `ttl` seconds.

What leases guard is deterministic and replaced whole, so the worst that a wrong guess costs is work done twice.
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

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import is_remote


@dataclass(frozen=True)
class Owner:
    """A process: `machine` is a host since it last started (and a container on it), `start` the pid's own start."""

    machine: str
    pid: int
    start: str

    @property
    def is_gone(self) -> bool:
        """Whether this machine, and no other, can tell that the process has ended."""
        if self.machine != _machine() or not self.start:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            return False
        return _start_of(self.pid) != self.start


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def this_process() -> Owner:
    """Return this process as an owner."""
    return Owner(_machine(), os.getpid(), _start_of(os.getpid()))


def _start_of(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks since boot; "" if there is none or no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # proc(5): a zombie is dead; field 22 is the start


TTL = 120.0
"""Seconds without a heartbeat after which a lease of another machine is dead; six heartbeats fall into them."""

POLL = 1.0
"""Seconds between two looks at a lease that is waited for."""

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LeaseLostError(Exception):
    """Another process has taken the lease over: this one was silent for too long."""


class Lease:
    """The right to write one thing, until it is released."""

    def __init__(self, path: Path, generation: int):
        self.path = path
        self.generation = generation
        self.content = json.dumps({**asdict(this_process()), "token": uuid.uuid4().hex}).encode() + b"\n"

    @property
    def file(self) -> Path:
        """The file of this generation."""
        return _file(self.path, self.generation)

    def confirm(self) -> None:
        """Raise `LeaseLostError` unless the lease is still this process's."""
        if _newest(self.path) != self.generation or not _read(self.file).startswith(self.content):
            raise LeaseLostError(f"lease {self.path} was taken over")

    def create(self) -> bool:
        """Make the file; return whether nobody else had."""
        if is_remote(self.path):
            return self._put()
        temporary = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex}.tmp")
        while True:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(self.content)
                os.link(temporary, self.file)
            except FileNotFoundError:
                continue  # another process has just tidied up
            except FileExistsError:
                return _read(self.file) == self.content  # the answer to a first attempt may be lost on a network
            except OSError as problem:
                if problem.errno not in _NO_LINKS:
                    raise
                return self._create_unlinked()
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            return True

    def _put(self) -> bool:
        """Object storage knows no exclusive creation: of two that put at once the last one has the lease."""
        if self.file.exists():
            return False
        self.file.write_bytes(self.content)
        return _read(self.file) == self.content

    def _create_unlinked(self) -> bool:
        try:
            with self.file.open("xb") as file:
                file.write(self.content)
        except FileExistsError:
            return False
        return True

    def renew(self) -> None:
        """Let others see that the owner is alive; a lease that is lost, or a full disk, shows elsewhere."""
        if is_remote(self.path):
            with suppress(Exception):  # a storage's client raises what it likes, and the heart must go on
                if (content := _read(self.file)).startswith(self.content):
                    self.file.write_bytes(content + b".")
            return
        with suppress(OSError):
            file = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(file, b".")
            finally:
                os.close(file)

    def remove(self) -> None:
        """Remove the file and those of earlier generations, the last one last, unless the lease is lost."""
        if not _read(self.file).startswith(self.content):
            return
        for generation in [*(g for g in _generations(self.path) if g < self.generation), self.generation]:
            with suppress(OSError):
                _file(self.path, generation).unlink(missing_ok=True)


class Leases:
    """The leases of one store, as this process holds and sees them."""

    def __init__(self, folder: Path, ttl: float = TTL):
        self.folder = folder
        self.ttl = ttl
        self._held: set[Lease] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._heart: threading.Thread | None = None

    def take(self, name: str) -> Lease | None:
        """Return the lease of this name, None if another process (or this one) has it and is alive.

        What the lease guards may have been done meanwhile: look again after taking it.

        Raises:
            UserError: The folder that holds the leases' own is gone. It must not be made anew: where a disk was, the
                work would go to the disk below.
        """
        if not is_remote(self.folder) and not self.folder.parent.is_dir():
            raise UserError(f"{self.folder.parent} has disappeared. Restore it and rerun the same command.")
        path = self.folder / name
        newest = _newest(path)
        if newest is not None and not self._is_dead(_file(path, newest)):
            return None
        lease = Lease(path, 0 if newest is None else newest + 1)
        with self._lock:
            self._held.add(lease)  # before it is there: a signal in between leaves nothing behind
        if not lease.create():
            with self._lock:
                self._held.discard(lease)
            return None
        # An observer that slept after its look may come when the takeover it lost is long over.
        stale = newest is not None and not _file(path, newest).exists()
        if stale or self._closed or _newest(path) != lease.generation:
            self.release(lease)
            return None
        self._beat()
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back. A lease that was lost is left to its new owner."""
        lease.remove()
        with self._lock:
            self._held.discard(lease)

    def release_all(self) -> None:
        """Give back whatever this process holds, and leave no empty folder."""
        for lease in list(self._held):
            self.release(lease)
        self.tidy()

    def close(self) -> None:
        """Give back whatever this process holds, and take nothing more: another thread may be about to."""
        self._closed = True
        self.release_all()

    @contextmanager
    def hold(self, name: str, waiting: Callable[[], object]) -> Iterator[Lease]:
        """Take a lease and release it at the end; if another process has it, call `waiting` once and wait."""
        lease = self.take(name)
        if lease is None:
            waiting()
        while lease is None:
            time.sleep(POLL)
            lease = self.take(name)
        try:
            yield lease
        finally:
            self.release(lease)
            self.tidy()

    def names(self) -> set[str]:
        """Return the names of all leases that have a file, dead or alive."""
        if is_remote(self.folder):
            files = [file.as_posix() for file in self.folder.rglob("*.json")]
        else:
            files = [f"{folder}/{file}" for folder, _, files in os.walk(self.folder) for file in files]
        start = len(self.folder.as_posix()) + 1
        return {file[start:].rsplit(".", 2)[0] for file in files if file.endswith(".json")}

    def remove(self, name: str) -> None:
        """Remove a lease of what is done, unless its owner is alive on this machine: it may be doing that again."""
        if self.is_held_here(name):
            return
        for generation in _generations(self.folder / name):
            with suppress(OSError):
                _file(self.folder / name, generation).unlink(missing_ok=True)

    def is_held_here(self, name: str) -> bool:
        """Whether a live process of this machine has the lease of this name."""
        newest = _newest(self.folder / name)
        owner = None if newest is None else _owner(_read(_file(self.folder / name, newest)))
        return owner is not None and _is_here(owner) and not owner.is_gone

    def tidy(self) -> None:
        """Remove what killed processes left beside their leases, and folders that are empty."""
        if is_remote(self.folder):
            return
        for folder, _, files in os.walk(self.folder, topdown=False):
            for leftover in (Path(folder, file) for file in files if file.endswith(".tmp")):
                leftover.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or gone already
                os.rmdir(folder)

    def _is_dead(self, file: Path) -> bool:
        content = _read(file)
        owner = _owner(content)
        if owner is not None and _is_here(owner):
            return owner.is_gone
        before, since = self._seen.get(file, (None, 0.0))
        if content != before:
            self._seen[file] = content, time.monotonic()
            return False
        return time.monotonic() - since > self.ttl

    def _beat(self) -> None:
        with self._lock:
            if self._heart is None:
                self._heart = threading.Thread(target=self._renew_held, name="leases", daemon=True)
                self._heart.start()

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


def _file(path: Path, generation: int) -> Path:
    return path.with_name(f"{path.name}.{generation}.json")


def _generations(path: Path) -> list[int]:
    """Return the generations of a lease that have a file, in order."""
    try:
        names = [file.name for file in path.parent.iterdir()] if is_remote(path) else os.listdir(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    pattern = re.compile(re.escape(path.name) + r"\.([0-9]+)\.json")
    return sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))


def _newest(path: Path) -> int | None:
    return max(_generations(path), default=None)


def _owner(content: bytes) -> Owner | None:
    """Return who made a lease of this content; None where it was cut short by a full disk or a crash."""
    try:
        record = json.loads(content.split(b"\n")[0])
        return Owner(record["machine"], record["pid"], record["start"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_here(owner: Owner) -> bool:
    return owner.machine == this_process().machine and bool(owner.start)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
