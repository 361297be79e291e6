"""Faults injected into small jobs, one at a time, at every operation on the file system.

    make faults JOBS=extract,fit COUNT=200

A first run of each job numbers its operations (`primitives.py`). Then, for every operation and every fault, the job
begins anew, fails there, and is rerun without faults:

- An injected error ends with one message and exit code 2, or the job carries on and writes what it should. It never
  ends with a traceback.
- What the job does not change is the same after the fault, and the rerun writes nothing committed again.
- After the rerun, the folder has the bytes of an undisturbed run, and nothing else.

All runs are forks of a process that has imported everything. `make faults` injects everything, the tests a sample.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.harness import Bench, Undisturbed, in_processes
from tests.faults.jobs import JOBS, Inputs
from tests.faults.primitives import FAULTS, OF_WRITES, ON_PATHS, Point

ENDS = ("message", "carried on", "killed")


class Injection(NamedTuple):
    """A fault at a point of a job."""

    job: str
    point: Point
    fault: str

    def __str__(self) -> str:
        operation, path, occurrence = self.point
        return f"{self.job}: {operation} {path} {occurrence}: {self.fault}"


@dataclass(frozen=True)
class Outcome:
    """How a run with a fault ended, one of `ENDS`, and what is wrong; "" if nothing."""

    job: str
    fault: str
    end: str
    problem: str
    name: str
    output: str


def list_injections(runs: Sequence[Undisturbed]) -> list[Injection]:
    """Return every possible fault at every operation of these jobs."""
    return [
        Injection(run.name, point, fault)
        for run in runs
        for point in sorted(set(run.points))
        for fault in FAULTS
        if _is_possible(point, fault)
    ]


def _is_possible(point: Point, fault: str) -> bool:
    if fault in OF_WRITES:
        return point.operation == "write"
    return fault != "EACCES" or point.operation in ON_PATHS


def by_rarity(injections: Sequence[Injection], seed: int = 0) -> list[Injection]:
    """Return injections in a random order in which each beginning has as many kinds as possible.

    A kind is a job, an operation and a fault. Within a kind, paths come first that differ by more than their numbers.
    """
    ordered = random.Random(seed).sample(injections, len(injections))
    for path_of in (lambda path: re.sub(r"\d+", "#", path), lambda path: ""):
        seen: Counter[tuple[str, ...]] = Counter()
        ranks = {}
        for each in ordered:
            kind = (each.job, each.point.operation, each.fault, path_of(each.point.path))
            ranks[each] = seen[kind]
            seen[kind] += 1
        ordered.sort(key=ranks.__getitem__)
    return ordered


def inject(injection: Injection, run: Undisturbed, inputs: Inputs, bench: Bench) -> Outcome:
    """Run a job with a fault, rerun it without, and check both."""
    bench.begin(run.base)
    end = bench.run(lambda: run.job.run(inputs.folder), injection.point, injection.fault)
    left, committed = bench.files(), run.job.committed(bench.work)
    problem, how = end.problem, "message"
    if injection.fault in ("kill", "torn"):
        how = "killed"
        if end.code != -signal.SIGKILL:
            problem = "does not reach the operation"
    elif end.code == 0:
        how = "carried on"
        problem = problem or run.check_carried_on(left)
        if injection.point not in end.points:
            problem = "does not reach the operation"
    elif end.code == 1 and run.job.on_fault:
        problem = problem or ("" if run.job.on_fault in end.output else "ends with 1 and no message")
    elif end.code != 2 or not end.output.rstrip().splitlines()[-1:][0].startswith("error: "):
        problem = problem or f"ends with {end.code} and no message"
    problem = problem or run.check_left(left)
    output = end.output
    if not problem:
        again = bench.run(lambda: run.job.run(inputs.folder))
        problem = run.check_rerun(again, bench.files(), committed)
        output += f"--- rerun\n{again.output}"
    return Outcome(injection.job, injection.fault, how, problem, str(injection), output)


def inject_all(
    injections: Sequence[Injection], runs: Sequence[Undisturbed], inputs: Inputs, folder: Path, workers: int
) -> list[Outcome]:
    """Inject faults in several processes, each with a bench of its own."""
    of_job = {run.name: run for run in runs}

    def work(worker: int, bench: Bench) -> Iterator[dict[str, Any]]:
        for each in injections[worker::workers]:
            yield asdict(inject(each, of_job[each.job], inputs, bench))

    return [Outcome(**outcome) for outcome in in_processes(workers, folder, work)]


def prepare(names: Sequence[str], folder: Path) -> tuple[Inputs, list[Undisturbed]]:
    """Write the inputs, and run each job without faults. Exits with a message if there is no job of a name."""
    if unknown := [name for name in names if name not in JOBS]:
        sys.exit(f"error: --jobs is invalid: got {unknown[0]!r}, expected some of {', '.join(JOBS)}.")
    bench = Bench(folder / "bench")

    def fork(work, where: Path) -> None:
        bench.begin(where)
        if (end := bench.run(work)).code:
            raise RuntimeError(f"a job fails without faults: exit code {end.code}\n{end.output}")
        bench.move_to(where)

    inputs = Inputs(folder, fork)
    return inputs, [Undisturbed.of(name, inputs, bench) for name in names]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of jobs and faults."""
    header = ("job", "fault", "points", *ENDS, "recovered", "failures")
    counts: dict[tuple[str, str], Counter[str]] = {}
    for each in outcomes:
        for key in ((each.job, each.fault), ("all", "all")):
            found = counts.setdefault(key, Counter())
            found.update(("points", each.end, "failures" if each.problem else "recovered"))
    order = [*JOBS, "all"], [*FAULTS, "all"]
    keys = sorted(counts, key=lambda key: (order[0].index(key[0]), order[1].index(key[1])))
    rows = [header, *((*key, *(str(counts[key][name]) for name in header[2:])) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )


def main() -> None:
    """Inject everything that the options choose; exit with 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", default=",".join(JOBS), help="names of jobs, separated by commas")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, help="inject at most so many faults, of all kinds")
    parser.add_argument("--only", help="part of the names of the injections")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name).resolve()
        inputs, runs = prepare(options.jobs.split(","), folder)
        every = [each for each in list_injections(runs) if (options.only or "") in str(each)]
        if not every:
            parser.error(f"--only {options.only!r} is in the name of no injection")
        injections = by_rarity(every)[: options.count]
        print(f"{len(injections)} of {len(every)} injections into {len(runs)} jobs", flush=True)
        outcomes = inject_all(injections, runs, inputs, folder, options.workers)
    failures = [each for each in outcomes if each.problem]
    for each in failures:
        print(f"\n{each.name}\n  {each.problem}\n{each.output.rstrip()}")
    print(f"\n{table(outcomes)}\n{len(outcomes):,} distinct injections in {time.monotonic() - started:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
