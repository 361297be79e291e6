"""Where a run is written, and its log of metrics."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sail_align.align.runs.checkpoint import read_checkpoint
from sail_align.align.runs.folder import BEGIN_AGAIN, decisive, differences, is_run, read_json
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import report_write_errors, write_atomically
from sail_align.extract.system.leases import POLL, TTL, Lease, LeaseLostError, Leases
from sail_align.extract.system.progress import note


class Claim(NamedTuple):
    """The folder of a run, and what is there: one that was `begun` goes on, one that is `finished` is left as it is.

    For a new run, `other` is the last one of its name, which has other settings: `differing` says which.
    """

    path: Path
    begun: bool
    finished: bool = False
    other: Path | None = None
    differing: tuple[str, ...] = ()


def default_path(stores: Sequence[Path], head: str) -> Path:
    """Return `runs/<store>-<head>`, several stores joined by `+`."""
    return Path("runs") / f"{'+'.join(path.stem for path in stores)}-{head}"


def claim_run(path: Path, settings: dict[str, Any], *, numbered: bool = True) -> Claim:
    """Return the folder for a run with these settings.

    That is the newest of `path`, `path-2`, `path-3`, … that is a run with the same settings, one that is not finished
    first, and else the next name: a run is never written over. A folder with nothing in it is free.

    Args:
        path: The run's folder.
        settings: What `Plan.record` returns.
        numbered: Whether another name may be taken where `path` is a run with other settings.

    Raises:
        UserError: The path is there and is not a run, or may not be numbered and has other settings, or it cannot be
            written.
    """
    if path.name in ("", ".."):  # "." and "..": names to which no number can be put
        path = path.resolve()
    with report_write_errors(path):
        return _claim(path, settings, numbered)


def _claim(path: Path, settings: dict[str, Any], numbered: bool) -> Claim:
    if not _is_free(path) and not is_run(path):
        raise UserError(f"{path} exists and is not a run; name another --out.")
    runs: list[Path] = []
    following, number = path, 1
    while not _is_free(following):
        if is_run(following):
            runs.append(following)
        number += 1
        following = path.with_name(f"{path.name}-{number}")
    finished: list[Path] = []
    others: list[tuple[Path, tuple[str, ...]]] = []
    for run in reversed(runs if numbered else runs[:1]):
        there = read_json(run / "settings.json", BEGIN_AGAIN)
        if decisive(there) != decisive(settings):
            others.append((run, differences(there, settings)))
        elif (saved := read_checkpoint(run)) is None or not saved.record["finished"]:
            return Claim(run, begun=True)
        else:
            finished.append(run)
    if finished:
        return Claim(finished[0], begun=True, finished=True)
    if others and not numbered:
        raise UserError(f"{path} is a run with other settings ({', '.join(others[0][1])}); name another --out.")
    write_atomically(following / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False).encode())
    return Claim(following, False, False, *(others[0] if others else ()))


def _is_free(path: Path) -> bool:
    """Whether a path is not there, or a folder with nothing in it but what a killed first write left."""
    return not path.exists() or (
        path.is_dir() and all(file.name.startswith(".settings.json.") for file in path.iterdir())
    )


@contextmanager
def hold_run(run: Path, settings: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Be the only process that writes a run. One that died, also on another machine, holds it no longer.

    Yields what raises a `UserError` if another process has taken the run over: this one was held up for minutes.

    Raises:
        UserError: Another process trains it, or began it with other settings just now.
    """
    leases = Leases(run / "lease")
    lease, since = leases.take("fit"), time.monotonic()
    if lease is None and not leases.is_held_here("fit"):
        note(f"{run} may be trained on another machine; looking for a sign of life for {TTL:.0f} s.")
    while lease is None:
        if leases.is_held_here("fit") or time.monotonic() - since > TTL + 2 * POLL:
            raise UserError(f"{run} is being trained by another process; let it end, or name another --out.")
        time.sleep(POLL)
        lease = leases.take("fit")
    try:
        if decisive(read_json(run / "settings.json", BEGIN_AGAIN)) != decisive(settings):
            raise UserError(f"{run} was begun with other settings just now; run the same command again.")
        yield partial(_confirm, lease, run)
    finally:
        leases.release_all()


def _confirm(lease: Lease, run: Path) -> None:
    try:
        lease.confirm()
    except LeaseLostError as problem:
        raise UserError(
            f"{run} was taken over by another process while this one was held up; let that end."
        ) from problem
