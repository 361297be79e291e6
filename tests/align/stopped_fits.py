"""Fits in separate processes that are killed, stopped, and started twice. Prints the observations as JSON.

Usage: stopped_fits.py SCENARIO STORE, in an empty folder. Attempts are forks of one process that has loaded torch.
"""

import json
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import interrupted
import torch._dynamo  # (the first step loads these two: seconds, once for all attempts)
import torch._inductor.compile_fx  # noqa: F401

from sail_align.align.cli import main
from sail_align.align.model import fused as functions
from sail_align.align.model import pair_blocks as blocks
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder
from sail_align.align.train import trainer

OPTIONS = {"dim": 8, "expansion": 2, "image-dropout": 0.2, "batch-size": 32, "lr": 3e-3, "start": "random"}
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))] + ["--device", "cpu", "--quiet"]


COMPILED = ["--batch-size", "4100", "--held-out", "0.42", "--temperature", "auto", "--on-collapse", "warn"]
"""Batches and held-out pairs of which the loss is compiled, in blocks of different sizes."""


def begin(store: str, out: str, steps: int, *more: str, die_at_write: int | None = None) -> int:
    """Start a fit that saves after every step, its output in <out>.txt; return its pid."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        if die_at_write is not None:
            interrupted.die_at_write(die_at_write)
        trainer.fit.__kwdefaults__["save_seconds"] = 0
        sys.argv = ["sail-align", "fit", "--features", store, "--out", out, "--steps", str(steps), *WORDS, *more]
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(run: Path) -> dict[str, str]:
    folders = [RunFolder(run).last, Checkpoint.best(run).folder]
    files = [run / "metrics.jsonl", *(file for folder in folders for file in sorted(folder.iterdir()))]
    return {str(file.relative_to(run)): file.read_bytes().hex() for file in files}


def saved_step(run: Path) -> int:
    saved = Checkpoint.read(run)
    return saved.step if saved else 0


def wait_for_step(run: Path, step: int) -> None:
    while not (folder := RunFolder(run).last) or RunFolder(folder).step < step:
        time.sleep(0.002)


def kills(store: str, steps: int = 40, *more: str) -> dict:
    """Killed at random moments, and at random points of saving, until it is done."""
    started = time.monotonic()
    assert end_of(begin(store, "whole", steps, *more)) == 0
    seconds = time.monotonic() - started
    choose = random.Random(0)
    seen = {"at a write": 0, "at a moment": 0, "saved at a kill": []}
    for attempt in count():
        die_at = choose.randrange(steps) if attempt % 2 else None
        pid = begin(store, "killed", steps, *more, die_at_write=die_at)
        if die_at is None:
            time.sleep(choose.uniform(0, seconds / 4))
            os.kill(pid, signal.SIGKILL)
        if end_of(pid) == 0:
            break
        seen["at a moment" if die_at is None else "at a write"] += 1
        seen["saved at a kill"].append(saved_step(Path("killed")))
    return {**seen, "seconds": seconds, "identical": contents(Path("killed")) == contents(Path("whole"))}


def compiled_kills(store: str) -> dict:
    """The same where loss and heads are compiled, by each attempt for itself."""
    functions.MANY_UNITS = 1
    assert end_of(begin(store, "first", 1, *COMPILED)) == 0  # it fills the compiler's cache
    result = kills(store, 16, *COMPILED)
    blocks.MANY_PAIRS = functions.MANY_UNITS = sys.maxsize
    assert end_of(begin(store, "eager", 16, *COMPILED)) == 0
    result["compiled"] = contents(Path("eager")) != contents(Path("whole"))
    result["not compiled"] = [
        line for line in Path("killed.txt").read_text().splitlines() if "Compiling failed" in line
    ]
    return result


def signals(store: str) -> dict:
    """SIGTERM, Ctrl-C, then on to the end."""
    assert end_of(begin(store, "whole", 40)) == 0
    seen = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before = saved_step(Path("stopped"))
        pid = begin(store, "stopped", 40)
        wait_for_step(Path("stopped"), before + 3)
        os.kill(pid, number)
        end = end_of(pid)
        said = Path("stopped.txt").read_text().splitlines()[-1]
        lines = [json.loads(line) for line in Path("stopped/metrics.jsonl").read_text().splitlines()]
        step = saved_step(Path("stopped"))
        seen[number.name] = {"end": end, "said": said, "step": step, "logged": lines[-1]["step"]}
    seen["end"] = end_of(begin(store, "stopped", 40))
    return {**seen, "identical": contents(Path("stopped")) == contents(Path("whole"))}


def two_at_once(store: str) -> dict:
    """The same command while it runs."""
    pid = begin(store, "run", 2_000)
    wait_for_step(Path("run"), 2)
    os.rename("run.txt", "first.txt")
    second = end_of(begin(store, "run", 2_000))
    os.kill(pid, signal.SIGTERM)
    said = Path("run.txt").read_text().splitlines()[-1]
    return {"first": end_of(pid), "second": second, "said": said, "left": [path.name for path in Path().glob("run*")]}


if __name__ == "__main__":
    scenarios = [kills, compiled_kills, signals, two_at_once]
    print(json.dumps({each.__name__: each for each in scenarios}[sys.argv[1]](sys.argv[2])))
