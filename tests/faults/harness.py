"""Runs of a job in forked processes, with or without a fault, and the comparison of what they leave."""

import faulthandler
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.jobs import JOBS, Inputs, Job
from tests.faults.primitives import Disk, Point, without_random

HANGS_AFTER = 60.0
"""Seconds after which a run is taken to hang."""

IGNORED = ".log.jsonl"
"""End of the name of files with times in them."""

Files = dict[str, bytes | None]
"""Content of each file below a folder, None for a folder."""


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        code: Exit code, or the negative number of the signal that killed it.
        output: What it printed.
        points: Its operations, unless it was killed.
        files: Files that it opened for writing, likewise.
        modules: Modules that it has imported, likewise.
    """

    code: int
    output: str
    points: list[Point] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)

    @property
    def problem(self) -> str:
        """Why this is no declared end: a traceback or a hang; "" if it is one."""
        if self.code == -signal.SIGABRT:
            return f"hangs for {HANGS_AFTER:.0f} s"
        return "ends with a traceback" if "Traceback (most recent call last)" in self.output else ""


class Bench:
    """A folder in which jobs run, one at a time."""

    def __init__(self, folder: Path):
        self.work, self._output, self._report = folder / "work", folder / "output.txt", folder / "report.json"
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, base: Path) -> None:
        """Copy the folder in which a job begins."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(base, self.work)

    def run(
        self, work: Callable[[], None], point: Point | None = None, fault: str = "", kill_after: float | None = None
    ) -> End:
        """Call a function in a fork, in the folder; fail at a point, or kill it after some seconds."""
        self._report.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            self._call(work, point, fault)
        code = _wait(pid, kill_after)
        report = json.loads(self._report.read_text()) if code >= 0 and self._report.exists() else {}
        points = [Point(*each) for each in report.get("points", ())]
        output = self._output.read_text(errors="replace")
        return End(code, output, points, set(report.get("files", ())), report.get("modules", []))

    def _call(self, work: Callable[[], None], point: Point | None, fault: str) -> None:
        """Call a function and end this process."""
        code = 1
        try:
            descriptor = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
            faulthandler.enable(2)
            os.chdir(self.work)
            tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a killed process would leak
            disk = Disk(str(self.work), point, fault)
            disk.install()
            try:
                work()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            sys.stdout.flush()
            disk.write_report(self._report)
        except BaseException:  # noqa: BLE001 (the traceback is in the output)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def move_to(self, folder: Path) -> None:
        """Replace a folder by this one."""
        shutil.rmtree(folder)
        shutil.copytree(self.work, folder)

    def files(self) -> Files:
        """Return what is below the folder."""
        return read_files(self.work)


@dataclass(frozen=True)
class Undisturbed:
    """A job's folder before and after a run without faults, and the operations of that run."""

    name: str
    job: Job
    base: Path
    before: Files
    after: Files
    points: list[Point]
    seconds: float

    @classmethod
    def of(cls, name: str, inputs: Inputs, bench: Bench) -> "Undisturbed":
        """Run a job. Raise if it fails, or if it writes a file in another way than the harness sees."""
        job = JOBS[name]
        base = inputs.base(job)
        bench.begin(base)
        before, started = bench.files(), time.monotonic()
        end = bench.run(lambda: job.run(inputs.folder))
        seconds = time.monotonic() - started
        if end.code or end.problem:
            raise RuntimeError(f"{name} fails without faults: exit code {end.code}\n{end.output}")
        for module in end.modules:  # so that the next runs need not
            with suppress(Exception):
                importlib.import_module(module)
        after = bench.files()
        unseen = [each for each in after if after[each] is not None and each not in before and each not in end.files]
        if unseen:
            raise RuntimeError(f"{name} writes files in a way that the harness does not see: {unseen}")
        return cls(name, job, base, before, after, end.points, seconds)

    def check_left(self, left: Files) -> str:
        """Return what is wrong with the files that a disturbed run left; "" if nothing."""
        for name, content in self.before.items():
            if self.after.get(name, b"") == content and left.get(name, b"") != content:
                return f"changes or removes {name}"
        return ""

    def check_carried_on(self, left: Files) -> str:
        """Return what is wrong with the files of a run that went on after an error; leftovers may remain."""
        return next((f"ends with 0 but {why}" for why in _differences(self.after, left, leftovers=True)), "")

    def check_rerun(self, end: End, left: Files, committed: set[str]) -> str:
        """Return what is wrong with a rerun without faults; `committed` begins paths that it must not write."""
        if end.problem:
            return f"rerun {end.problem}"
        is_done = bool(self.job.when_done) and end.code == 2 and self.job.when_done in end.output
        if end.code and not is_done:
            return f"rerun ends with {end.code}"
        kept = tuple(map(without_random, committed))
        for point in end.points:
            if point.operation in ("create", "rename") and point.path.startswith(kept):
                return f"rerun writes {point.path} again"
        return next((f"after the rerun, {why}" for why in _differences(self.after, left)), "")


def in_processes(
    workers: int, folder: Path, work: Callable[[int, Bench], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the results of a function that is called in forks, each with its number and a bench of its own."""
    pids = []
    for worker in range(workers):
        sys.stdout.flush()
        pids.append(os.fork())
        if pids[-1]:
            continue
        code = 1
        try:
            with (folder / f"results-{worker}.jsonl").open("w") as file:
                for result in work(worker, Bench(folder / f"bench-{worker}")):
                    print(json.dumps(result), file=file, flush=True)
            code = 0
        except BaseException:  # noqa: BLE001 (shown, and raised below)
            traceback.print_exc()
        finally:
            os._exit(code)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(statuses):
        raise RuntimeError("a process of the harness failed, see above")
    files = [folder / f"results-{worker}.jsonl" for worker in range(workers)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def read_files(folder: Path) -> Files:
    """Return what is below a folder, but logs with times."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.name.endswith(IGNORED)}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in sorted(paths.items())}


def _differences(expected: Files, found: Files, *, leftovers: bool = False) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in found]
    changed = [f"{name} has other bytes" for name in expected if name in found and found[name] != expected[name]]
    more = [f"{name} is left over" for name in found if name not in expected and not leftovers]
    return missing + changed + more


def _wait(pid: int, kill_after: float | None) -> int:
    """Wait for a process and return its exit code; abort it if it hangs."""
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if kill_after is not None and seconds >= kill_after:
            os.kill(pid, signal.SIGKILL)
            kill_after = None
        elif seconds > HANGS_AFTER:
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.0005 if kill_after else 0.002)
