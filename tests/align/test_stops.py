"""A fit that is killed or stopped at any moment, and typed again, ends as one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def seen(make_store, tmp_path):
    """Play a scenario of stopped_fits.py; return what it saw."""

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


def test_a_fit_killed_at_any_moment_ends_with_the_same_bytes(seen):
    check_kills(seen("kills"))


def test_so_does_one_whose_loss_and_heads_are_compiled(seen):
    result = seen("compiled_kills", rows=10_000, shard_rows=4_096, chunk_rows=256)
    check_kills(result)
    if result["not compiled"]:
        pytest.skip(f"no compiler: {result['not compiled'][0]}")
    assert result["compiled"]


def test_sigterm_and_ctrl_c_save_the_step_and_end(seen):
    result = seen("signals")
    for name, said, code in [("SIGTERM", "SIGTERM", 143), ("SIGINT", "Ctrl-C", 130)]:
        stop = result[name]
        assert stop["end"] == code
        assert stop["logged"] == stop["step"]
        assert stop["said"] == f"Stopped by {said}; the same command goes on with stopped from step {stop['step']}."
    assert result["end"] == 0
    assert result["identical"]


def test_a_second_command_at_once_is_refused_with_a_sentence(seen):
    result = seen("two_at_once")
    assert (result["first"], result["second"]) == (143, 2)
    assert result["said"] == "error: run is being trained by another process; let it end, or name another --out."
    assert sorted(result["left"]) == ["run", "run.txt"]
