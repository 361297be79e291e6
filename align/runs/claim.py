"""The choice of a run's folder, and the lock that lets one process write it."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder, differences, run_digest
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import report_write_errors, write_atomically
from sail_align.extract.system.leases import POLL, TTL, LeaseLostError, Leases
from sail_align.extract.system.progress import note


class Claim(NamedTuple):
    """The folder chosen for a run: new, `begun` (to be resumed) or `finished`.

    For a new run, `other` is the last run of that name, whose settings differ in `differing`.
    """

    path: Path
    begun: bool
    finished: bool = False
    other: Path | None = None
    differing: tuple[str, ...] = ()


def claim_run(path: Path, settings: dict[str, Any], *, numbered: bool = True) -> Claim:
    """Choose the folder for a run with these settings, and create it if it is new.

    The choice is the newest of `path`, `path-2`, `path-3`, … that is a run with the same settings, preferably an
    unfinished one. If there is none, it is the next free name: no run is ever overwritten.

    Args:
        path: Folder of the run.
        settings: Result of `Plan.record`.
        numbered: Whether a number may be added if `path` is a run with other settings.

    Raises:
        UserError: The path exists and is not a run, has other settings and may not be numbered, or is not writable.
    """
    if path.name in ("", ".."):  # "." and "..": no number can be added to these names
        path = path.resolve()
    with report_write_errors(path):
        if not _is_free(path) and not RunFolder(path).is_run:
            raise UserError(f"{path} exists and is not a run. Pass another --out.")
        runs, free = _runs_at(path)
        digest = run_digest(settings)
        finished: list[Path] = []
        others: list[tuple[Path, tuple[str, ...]]] = []
        for run in reversed(runs if numbered else runs[:1]):
            there = RunFolder(run).settings()
            if run_digest(there) != digest:
                others.append((run, differences(there, settings)))
            elif (saved := Checkpoint.read(run)) is None or not saved.finished:
                return Claim(run, begun=True)
            else:
                finished.append(run)
        if finished:
            return Claim(finished[0], begun=True, finished=True)
        if others and not numbered:
            raise UserError(f"{path} is a run with other settings ({'; '.join(others[0][1])}). Pass another --out.")
        write_atomically(free / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False).encode())
        return Claim(free, False, False, *(others[0] if others else ()))


def find_run(path: Path, settings: dict[str, Any], *, but: str, numbered: bool = True) -> Any:
    """Return one setting of the newest run that has these settings but for this one; None if there is none.

    Args:
        path: Folder of the run, as for `claim_run`.
        settings: Result of `Plan.record`.
        but: Name of the setting.
        numbered: As for `claim_run`.
    """
    runs, _ = _runs_at(path.resolve() if path.name in ("", "..") else path)
    for run in reversed(runs if numbered else runs[:1]):
        there = RunFolder(run).settings()
        if run_digest({**there, but: settings[but]}) == run_digest(settings):
            return there.get(but)
    return None


def _runs_at(path: Path) -> tuple[list[Path], Path]:
    """Return the runs at `path`, `path-2`, `path-3`, …, and the first of these names that is free."""
    runs: list[Path] = []
    free, number = path, 1
    while not _is_free(free):
        if RunFolder(free).is_run:
            runs.append(free)
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return runs, free


def _is_free(path: Path) -> bool:
    """Return whether a path does not exist, or is a folder that holds at most leftovers of a killed first write."""
    return not path.exists() or (
        path.is_dir() and all(file.name.startswith(".settings.json.") for file in path.iterdir())
    )


@contextmanager
def hold_run(run: Path, digest: str) -> Iterator[Callable[[], None]]:
    """Lock a run for this process. The lock of a process that died expires, on other machines too.

    Yields a function that raises `UserError` if another process took the lock because this one hung for minutes.

    Args:
        run: Folder of the run.
        digest: Expected `run_digest` of its settings.

    Raises:
        UserError: Another process trains the run, or has just created it with other settings.
    """
    leases = Leases(run / "lease")
    lease, since = leases.take("fit"), time.monotonic()
    if lease is None and not leases.is_held_here("fit"):
        note(f"{run} may be in training on another machine; watching it for {TTL:.0f} s.")
    while lease is None:
        if leases.is_held_here("fit") or time.monotonic() - since > TTL + 2 * POLL:
            raise UserError(f"{run} is being trained by another process. Wait for its end, or pass another --out.")
        time.sleep(POLL)
        lease = leases.take("fit")
    held = lease

    def confirm() -> None:
        try:
            held.confirm()
        except LeaseLostError as problem:
            raise UserError(f"{run} was taken over by another process while this one hung. Let it finish.") from problem

    try:
        if run_digest(RunFolder(run).settings()) != digest:
            raise UserError(f"{run} was just created by another process with other settings. Rerun the same command.")
        yield confirm
    finally:
        leases.release_all()
