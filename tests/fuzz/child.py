"""Run one input in a forked child with limits on time and memory, and judge how it ended."""

import faulthandler
import gc
import hashlib
import json
import logging
import os
import re
import resource
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sail_align.extract.errors import UserError

SECONDS = 2
"""Limit on the processor time of one input."""
WALL_SECONDS = 15
"""Limit on its wall-clock time, for inputs that wait. Higher, because other processes may have the cores."""
MEGABYTES = 512
"""Limit on the memory of one input beyond that of the idle process."""
ADDRESS_MEGABYTES = 2048
"""Limit on the address space beyond that of the idle process. Threads reserve some that they never use."""

INTERNALS = re.compile(
    r"Input should|validation error|errors\.pydantic\.dev|input_value|\[type=|<class '|object at 0x|Traceback"
    r"|NoneType|not subscriptable|has no attribute|unexpected keyword|positional argument|__init__"
)
"""Words of Python, pydantic and their like, which no message for users contains."""
LONGEST_MESSAGE = 2_000
EXPECTED = re.compile(
    r"(note|error|warning|skipped): |\s*$|Fax\d?Decode\w*: |JPEGLib: |Corrupt EXIF data|Tag data larger than file"
)
"""Lines of ours; those of libtiff on TIFFs with fax or JPEG compression, whose faults change pixels and nothing else,
like most damage to the data of a JPEG; and Pillow's on EXIF data, without which a picture is taken as upright."""


@dataclass(frozen=True)
class Outcome:
    """How an input ended.

    Attributes:
        kind: `well`; `declared`, with a `UserError`, a warning of ours or the status of a sample; or `failed`.
        message: The error, or what is wrong.
        observed: Digest of everything that was read, if the input ended well.
        megabytes: Peak memory beyond that of the idle process.
    """

    kind: str
    message: str = ""
    observed: str = ""
    megabytes: int = 0


class Notes:
    """What the code under test declared without raising: statuses of samples, findings of a check."""

    def __init__(self) -> None:
        self.declared: list[str] = []

    def add(self, message: object) -> None:
        self.declared.append(str(message))


def judge(work: Callable[[Notes], object], folder: Path) -> Outcome:
    """Run a function in a forked child whose current folder is `folder`, and return how it ended.

    The child's output is in the file `output` beside the folder.
    """
    report, output = folder.with_suffix(".outcome"), folder.with_suffix(".output")
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            _redirect(output)
            os.chdir(folder)
            outcome = _run(work)
            report.write_text(json.dumps(asdict(outcome)))
        except BaseException:  # noqa: BLE001 (the parent shows the output)
            traceback.print_exc()
        finally:
            os._exit(0)
    descriptor = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([descriptor], [], [], WALL_SECONDS)
        if not ended:
            os.kill(child, signal.SIGABRT)  # faulthandler prints the stack
    finally:
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    if report.exists():
        return Outcome(**json.loads(report.read_text()))
    stack = output.read_text(errors="replace")[-1_500:]
    if not ended:
        return Outcome("failed", f"hang: not finished after {WALL_SECONDS} s of wall-clock time\n{stack}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return Outcome("failed", f"hang: more than {SECONDS} s of processor time\n{stack}")
    return Outcome("failed", f"crash: wait status {status}\n{stack}")


def _redirect(output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, errors="replace") for stream in (1, 2))


def _run(work: Callable[[Notes], object]) -> Outcome:
    gc.disable()  # a collection would touch, and so copy, the memory that is shared with the parent
    idle = _memory("VmRSS")
    address = (_memory("VmSize") + ADDRESS_MEGABYTES) << 20
    resource.setrlimit(resource.RLIMIT_AS, (address, address))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    logged = _Log()
    logging.getLogger().addHandler(logged)
    notes = Notes()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        outcome = _outcome(work, notes)
        signal.setitimer(signal.ITIMER_PROF, 0)
    peak = _memory("VmHWM") - idle
    message = "; ".join(filter(None, [outcome.message, *notes.declared[:3], *logged.ours[:3]]))
    foreign = [str(each.message) for each in warned if not _is_ours(each.filename)] + logged.foreign
    foreign = [line for line in [*foreign, *_printed()] if not EXPECTED.match(line)]
    kind = outcome.kind
    if kind == "well" and (notes.declared or logged.ours):
        kind = "declared"
    if peak > MEGABYTES:
        return Outcome("failed", f"memory: {peak} MB; {message}", megabytes=peak)
    if kind == "well" and foreign:
        return Outcome("failed", f"warning: only a library warned: {foreign[0][:500]}", megabytes=peak)
    texts = [outcome.message] if kind == "declared" else []
    texts += [*notes.declared, *logged.ours]
    for text in texts if kind == "declared" else ():
        if found := INTERNALS.search(text):
            return Outcome("failed", f"words: the message contains {found[0]!r}: {text[:800]}", megabytes=peak)
        if len(text) > LONGEST_MESSAGE:
            return Outcome("failed", f"words: a message of {len(text):,} characters: {text[:300]} …", megabytes=peak)
    return Outcome(kind, message[:3_000], outcome.observed, peak)


def _outcome(work: Callable[[Notes], object], notes: Notes) -> Outcome:
    try:
        seen = work(notes)
    except UserError as problem:
        if _lacked_memory(problem):
            return Outcome("failed", f"memory: it was refused, then {problem}")
        return Outcome("declared", str(problem))
    except BaseException as problem:  # noqa: BLE001 (the child reports everything)
        return Outcome("failed", f"raises {type(problem).__name__}: {problem}"[:600] + f"\n{_frames(problem)}")
    return Outcome("well", observed=hashlib.sha256(repr(seen).encode("utf-8", "surrogatepass")).hexdigest())


def _lacked_memory(problem: BaseException | None) -> bool:
    while problem is not None:
        if isinstance(problem, MemoryError) or "allocate" in str(problem):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _frames(problem: BaseException) -> str:
    return "".join(traceback.format_tb(problem.__traceback__)[-6:])


def _is_ours(file: str) -> bool:
    return "site-packages" not in file and "/lib/python" not in file


def _printed() -> list[str]:
    """Return the lines that were written past Python's streams, by C libraries."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return Path(f"/proc/self/fd/{sys.stderr.fileno()}").read_text(errors="replace").splitlines()


def _memory(name: str) -> int:
    """Return a field of /proc/self/status in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


class _Log(logging.Handler):
    """Collects warnings of the package and of libraries."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.ours: list[str] = []
        self.foreign: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        (self.ours if record.name.startswith("sail_align") else self.foreign).append(record.getMessage())
