"""A fit that is killed or stopped at any moment, and rerun, ends like an uninterrupted one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def seen(make_store, tmp_path):
    """Run a scenario of stopped_fits.py; return its observations."""

    def play(scenario, rows=400, **sizes):
        store = make_store("photos", rows=rows, **sizes)
        script = Path(__file__).with_name("stopped_fits.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
        played = subprocess.run(
            [sys.executable, str(script), scenario, str(store)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=900,
        )
        return json.loads(played.stdout)

    return play


def check_kills(result):
    print(result)
    assert result["at a moment"] >= 3
    assert result["at a write"] >= 3
    assert len(set(result["saved at a kill"])) >= 4
    assert result["identical"]


def test_killed_fit_ends_with_the_same_bytes(seen):
    check_kills(seen("kills"))


def test_killed_compiled_fit_ends_with_the_same_bytes(seen):
    result = seen("compiled_kills", rows=10_000, shard_rows=4_096, chunk_rows=256)
    check_kills(result)
    if result["not compiled"]:
        pytest.skip(f"no compiler: {result['not compiled'][0]}")
    assert result["compiled"]


def test_signals_save_the_step_and_stop(seen):
    result = seen("signals")
    for name, said, code in [("SIGTERM", "SIGTERM", 143), ("SIGINT", "Ctrl-C", 130)]:
        stop = result[name]
        assert stop["end"] == code
        assert stop["logged"] == stop["step"]
        assert stop["said"] == f"Stopped by {said}. The same command resumes stopped from step {stop['step']}."
    assert result["end"] == 0
    assert result["identical"]


def test_second_command_at_once_is_rejected(seen):
    result = seen("two_at_once")
    assert (result["first"], result["second"]) == (143, 2)
    assert result["said"] == "error: run is being trained by another process. Wait for its end, or pass another --out."
    assert sorted(result["left"]) == ["run", "run.txt"]
