"""Where a run is written, and its log of metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sail_align.align.checkpoint import is_run, read_record
from sail_align.extract.files import write_atomically


def default_path(stores: Sequence[Path], head: str) -> Path:
    """Return `runs/<store>-<head>`, several stores joined by `+`."""
    return Path("runs") / f"{'+'.join(path.stem for path in stores)}-{head}"


def claim_run(path: Path, settings: dict[str, Any]) -> tuple[Path, bool]:
    """Return the folder for a run with these settings, and whether it was begun before.

    That is the newest of `path`, `path-2`, `path-3`, … if it is an unfinished run with the same settings, and else the
    next name: a run is never written over.
    """
    newest, following = None, path
    number = 1
    while following.exists():
        newest, number = following, number + 1
        following = path.with_name(f"{path.name}-{number}")
    if newest is not None and _can_go_on(newest, settings):
        return newest, True
    following.mkdir(parents=True)
    write_atomically(following / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False).encode())
    return following, False


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line with its `kind` and `step`. Opened at a step, it drops what came later.

    It holds no times and no paths: a run that was stopped and resumed writes the same bytes as one that was not.
    """

    def __init__(self, run: Path, step: int | None):
        """Open the log of a run that goes on behind `step`, or of one that begins (None)."""
        path = run / "metrics.jsonl"
        kept = []
        if step is not None:
            for line in path.read_text().splitlines(keepends=True):
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
        write_atomically(path, "".join(kept).encode())
        self._file = path.open("a")

    def write(self, kind: str, step: int, **values: float) -> None:
        """Write one line; it is in the file when this returns."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _can_go_on(run: Path, settings: dict[str, Any]) -> bool:
    if not is_run(run) or json.loads((run / "settings.json").read_bytes()) != settings:
        return False
    record = read_record(run)
    return record is None or not record["finished"]
