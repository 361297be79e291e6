"""Fuzz everything that reads files: `make fuzz MINUTES=5 SEED=1`, or one input again with `FUZZ_ONLY=tar:12345`."""

import argparse
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # the others reserve gigabytes of address space

from fuzz.child import Notes, Outcome, judge
from fuzz.targets import TARGETS, Case
from warm_processes import PRELOADED

AT_ONCE = 20
"""Inputs of a target before it is the next one's turn."""


@dataclass
class Tally:
    """Inputs of one target, and how they ended."""

    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    peak: int = 0

    def row(self, name: str) -> str:
        """Return the line of the table."""
        total = self.kinds.total()
        rate = total / self.seconds if self.seconds else 0.0
        counts = "".join(f"{self.kinds[kind]:>10,}" for kind in ("well", "declared", "failed"))
        return f"{name:<12}{total:>9,}{counts}{self.peak:>9,}{rate:>8.1f}"


class Fuzzer:
    """The worlds of some targets in a folder, and the inputs made from them.

    Args:
        folder: Folder for worlds and inputs.
        seed: Seed of all inputs.
        names: The targets.
    """

    def __init__(self, folder: Path, seed: int, names: list[str]):
        os.fsync = lambda _: None  # type: ignore[assignment]  # power cuts are not under test
        self.folder, self.seed = folder, seed
        self.cases = {name: list(TARGETS[name](folder / "worlds" / name)) for name in names}
        self._references = {
            (name, case.name): self._reference(name, case) for name in names for case in self.cases[name]
        }

    def run(self, target: str, number: int) -> tuple[Outcome, Case, list[str]]:
        """Run one input. Returns its outcome, its case and the files that were changed. They stay in `input`."""
        random = Random(f"{self.seed}:{target}:{number}")
        case = random.choice(self.cases[target])
        files, resealed = case.mutated(random)
        folder = self._copy(case)
        for name, content in files.items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
        outcome = judge(case.act, folder)
        is_reference = outcome.observed == self._references[target, case.name]
        if outcome.kind == "well" and case.covered and not resealed and not is_reference:
            outcome = Outcome("failed", "accepted: the change alters what is read, and nothing says so")
        return outcome, case, list(files)

    def _reference(self, target: str, case: Case) -> str:
        """Return what is read from the valid folder, in a child, after reading it here: children start warm then."""
        folder, before = self._copy(case), Path.cwd()
        os.chdir(folder)
        try:
            case.act(Notes())
        finally:
            os.chdir(before)
        outcome = judge(case.act, self._copy(case))
        if outcome.kind != "well":
            raise RuntimeError(f"the valid files of {target}, {case.name} end with {outcome}")
        return outcome.observed

    def _copy(self, case: Case) -> Path:
        folder = self.folder / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case.folder, folder)
        return folder


def signature(message: str) -> str:
    """Return the part of a failure's message by which failures are grouped: its kind, and where it was raised."""
    first = message.splitlines()[0]
    places = [line.strip() for line in message.splitlines() if line.strip().startswith("File ")]
    ours = [place for place in places if "site-packages" not in place and "/tests/" not in place] or places
    if ours:
        return f"{first.split(':')[0]} at {'/'.join(ours[-1].rsplit('/', 2)[1:])}"
    return re.sub(r"[0-9]+", "N", " ".join(first.split("'")[:2])[:60])


def fuzz(fuzzer: Fuzzer, seconds: float, first: int = 0, inputs: int | None = None) -> int:
    """Fuzz the targets in turns, print each new kind of failure and a table. Returns the number of failures.

    Args:
        fuzzer: Makes and runs the inputs.
        seconds: Time after which it ends.
        first: Number of the first input of each target.
        inputs: Number of inputs of each target after which it ends.
    """
    tallies = {name: Tally() for name in fuzzer.cases}
    seen: Counter[tuple[str, str]] = Counter()
    end, start = time.monotonic() + seconds, first
    while time.monotonic() < end and (inputs is None or start < first + inputs):
        for name, tally in tallies.items():
            began = time.monotonic()
            for number in range(start, start + min(AT_ONCE, inputs or AT_ONCE)):
                outcome, case, files = fuzzer.run(name, number)
                tally.kinds[outcome.kind] += 1
                tally.peak = max(tally.peak, outcome.megabytes)
                if outcome.kind == "failed":
                    kind = name, signature(outcome.message)
                    seen[kind] += 1
                    if seen[kind] == 1:
                        replay = f"make fuzz SEED={fuzzer.seed} FUZZ_ONLY={name}:{number}"
                        print(
                            f"{replay}  ({case.name}: {', '.join(map(ascii, files))})\n  {outcome.message[:600]}",
                            flush=True,
                        )
                if time.monotonic() > end:
                    break
            tally.seconds += time.monotonic() - began
        start += min(AT_ONCE, inputs or AT_ONCE)
    print(f"{'target':<12}{'inputs':>9}{'well':>10}{'declared':>10}{'failed':>10}{'peak MB':>9}{'per s':>8}")
    for name, tally in tallies.items():
        print(tally.row(name))
    for (name, what), count in seen.most_common():
        print(f"{count:>6} × {name}: {what}")
    return seen.total()


def main() -> int:
    """Parse the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--inputs", type=int, default=0, help="inputs of each target, instead of a time")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", default="", help="targets separated by commas, or TARGET:NUMBER for one input")
    options = parser.parse_args()
    target, _, number = options.only.partition(":")
    names = target.split(",") if target else list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]!r}; expected {', '.join(TARGETS)}")
    for module in PRELOADED:
        import_module(module)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder).resolve(), options.seed, names)
        if number:
            outcome, case, files = fuzzer.run(target, int(number))
            kept = Path("build/fuzz").resolve() / f"{target}-{options.seed}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(Path(folder) / "input", kept)
            print(f"{case.name}: {', '.join(map(ascii, files))}, kept in {kept}\n{outcome.kind}: {outcome.message}")
            print((Path(folder).resolve() / "input.output").read_text(errors="replace"))
            return int(outcome.kind == "failed")
        print(f"seed {options.seed}; {sum(map(len, fuzzer.cases.values()))} valid folders", flush=True)
        seconds, inputs = (math.inf, options.inputs) if options.inputs else (60 * options.minutes, None)
        return int(fuzz(fuzzer, seconds, options.first, inputs) > 0)


if __name__ == "__main__":
    sys.exit(main())
