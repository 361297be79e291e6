"""Processes, told apart: on this machine and on others, now and after a restart."""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


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
