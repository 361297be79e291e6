"""A small, always equal sample of `make fuzz`, and the judge of its inputs."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from fuzz import child
from fuzz.child import judge

from sail_align.extract.errors import UserError

TESTS = Path(__file__).parents[1]


def raises(problem):
    def work(notes):
        raise problem

    return work


def warns(notes):
    warnings.warn_explicit("odd", UserWarning, "/usr/lib/python3/site-packages/x.py", 1)


def declares_and_warns(notes):
    notes.add("row 3 is undecodable")
    warns(notes)


def spins(notes):
    while True:
        pass


def wrapped_memory_error(notes):
    try:
        bytearray(1 << 40)
    except MemoryError as problem:
        raise UserError("the file is damaged") from problem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (lambda notes: 3, "well", ""),
        (raises(UserError("x is invalid")), "declared", "x is invalid"),
        (lambda notes: notes.add("row 3 is undecodable"), "declared", "row 3"),
        (declares_and_warns, "declared", "row 3"),
        (raises(KeyError("x")), "failed", "raises KeyError"),
        (raises(UserError("x: Input should be a valid string")), "failed", "words"),
        (raises(UserError("x" * 3_000)), "failed", "words"),
        (raises(SystemExit(3)), "failed", "raises SystemExit"),
        (warns, "failed", "warning: only a library"),
        (lambda notes: os.write(2, b"libpng warning: odd\n"), "failed", "warning: only a library"),
        (spins, "failed", "hang: more than"),
        (lambda notes: time.sleep(60), "failed", "hang: not finished"),
        (lambda notes: len(b"x" * (1 << 30)), "failed", "memory: "),
        (wrapped_memory_error, "failed", "memory: it was refused"),
        (lambda notes: os.kill(os.getpid(), 9), "failed", "crash"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_end_of_an_input_is_judged(tmp_path, monkeypatch, work, kind, message):
    monkeypatch.setattr(child, "SECONDS", 0.2 if work is spins else 2)
    monkeypatch.setattr(child, "WALL_SECONDS", 1 if message == "hang: not finished" else 15)
    folder = tmp_path / "input"
    folder.mkdir()
    outcome = judge(work, folder)
    assert (outcome.kind, outcome.message[: len(message)]) == (kind, message)


@pytest.mark.thorough
@pytest.mark.slow
def test_no_input_of_a_sample_fails(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fuzz", "--inputs", "4", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
