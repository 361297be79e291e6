"""A fit that is killed or stopped at any moment, and rerun, ends like an uninterrupted one."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from saving_fit import fit

from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder

pytestmark = pytest.mark.slow

OPTIONS = {
    "head": "glu",
    "dim": 8,
    "expansion": 2,
    "image-dropout": 0.2,
    "batch-size": 32,
    "lr": 3e-3,
    "start": "random",
}
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))] + ["--device", "cpu", "--quiet"]
COMPILED = ["--batch-size", "50", "--held-out", "0.4", "--temperature", "auto", "--on-collapse", "warn"]
"""Training and held-out pairs are cut into blocks of different sizes."""


@pytest.fixture
def begin(make_store, start_warm, tmp_path, monkeypatch):
    """Start a fit that saves after every step into the folder `run`."""
    store = make_store("photos", rows=400)
    monkeypatch.chdir(tmp_path)

    def begin(run, steps, *more, die_at=None, compiled=False):
        words = ["--features", str(store), "--out", str(run), "--steps", str(steps), *WORDS, *more]
        return start_warm(fit, words, die_at, compiled, output=Path(f"{run}.txt"))

    return begin


def contents(run):
    folders = [RunFolder(run).last, Checkpoint.best(run).folder]
    files = [run / "metrics.jsonl", *(file for folder in folders for file in sorted(folder.iterdir()))]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def saved_step(run):
    folder = RunFolder(run).last
    return RunFolder(folder).step if folder else 0


def check_kills(begin, steps, kills, *more, **options):
    """Kill a fit, at random moments and at random writes by turns; check that it ends as one that was not killed."""
    whole, run = Path("whole"), Path("killed")
    process = begin(whole, steps, *more, **options)
    assert process.wait() == 0, process.output
    choose = random.Random(0)
    saved = [0]
    for kill in range(kills):
        at_a_moment = kill % 2 == 0
        process = begin(run, steps, *more, **options, die_at=None if at_a_moment else choose.randrange(40))
        if at_a_moment:
            step = saved[-1] + choose.randrange(4)
            process.wait_until(lambda step=step: saved_step(run) >= step)
            time.sleep(choose.uniform(0, 0.02))
            process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.output
        saved.append(saved_step(run))
    print("saved at each kill:", saved)
    assert len(set(saved)) > kills / 2
    process = begin(run, steps, *more, **options)
    assert process.wait() == 0, process.output
    assert contents(run) == contents(whole)


def test_killed_fit_ends_with_the_same_bytes(begin):
    check_kills(begin, 30, 4)


@pytest.mark.thorough
def test_killed_compiled_fit_ends_with_the_same_bytes(begin):
    check_kills(begin, 15, 2, *COMPILED, compiled=True)
    if "Compiling failed" in (said := Path("killed.txt").read_text()):
        pytest.skip(f"no compiler: {said}")
    assert int(Path("graphs").read_text()) > 0


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_signals_save_the_step_and_stop(begin, number, name):
    steps, run = 25, Path("stopped")
    assert begin("whole", steps).wait() == 0
    process = begin(run, steps)
    process.wait_until(lambda: saved_step(run) >= 3)
    process.send(number)
    assert process.wait() == 128 + number
    step = saved_step(run)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == step
    said = f"Stopped by {name}. The same command resumes stopped from step {step}."
    assert process.output.splitlines()[-1] == said
    assert begin(run, steps).wait() == 0
    assert contents(run) == contents(Path("whole"))


def test_second_command_at_once_is_rejected(begin, tmp_path):
    run = Path("run")
    first = begin(run, 2_000)
    first.wait_until(lambda: saved_step(run) >= 2)
    Path("run.txt").rename("first.txt")
    second = begin(run, 2_000)
    assert second.wait() == 2
    first.send(signal.SIGTERM)
    said = "error: run is being trained by another process. Wait for its end, or pass another --out."
    assert second.output.splitlines()[-1] == said
    assert first.wait() == 143
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run", "run.txt"]
