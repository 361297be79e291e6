"""Whatever dies while a store is made: it comes out byte-identical, and nothing that was committed is done again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def seen(pictures):
    """Play a scenario of faulty_runs.py; return what it saw."""

    def play(scenario: str):
        command = [sys.executable, str(Path(__file__).with_name("faulty_runs.py")), str(pictures), scenario]
        played = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
        return json.loads(played.stdout)

    return play


def test_a_store_killed_at_random_moments_is_byte_identical(seen):
    result = seen("kills")
    print(result)
    assert result["kills"] >= 30
    assert result["end"] == 0
    assert result["identical"]
    assert result["same batches"]
    assert result["encoded again"] == result["lost in flight"]
    assert result["most lost in a kill"] <= 2  # one being encoded, one being written


def test_two_commands_at_once_share_the_work(seen):
    result = seen("two_at_once")
    assert result == {
        "ends": [0] * 4,
        "identical": [True, True],
        "most often encoded": [1, 1],
        "same batches": True,
    }


def test_sigterm_and_ctrl_c_end_a_run_cleanly_within_seconds(seen):
    result = seen("signals")
    for name, said, code in [("SIGTERM", "SIGTERM", 143), ("SIGINT", "Ctrl-C", 130)]:
        stop = result[name]
        assert stop["end"] == code
        assert stop["seconds"] < 5
        assert stop["said"].startswith(f"Stopped by {said}: ")
        assert stop["said"].endswith(". Rerun the same command to continue.\n")
        assert stop["said"].count("\n") == 1
        assert stop["left behind"] == []
        assert stop["log"]["end"] == said
        assert 0 < stop["log"]["encoded"] < 1_800
        assert stop["log"]["encoded"] + stop["log"]["left"] == 1_800
    assert result["end"] == 0
    assert result["identical"]
    assert result["encoded again"] <= 1


def test_workers_go_on_without_one_that_was_killed_and_stop_with_their_parent(seen):
    result = seen("workers")
    assert result["end"] == 0
    assert "was killed by SIGKILL. The other 2 continue with its shards." in result["said"]
    assert result["identical"]
    assert result["encoded again"] <= 2
    assert result["stopped"]["end"] == 143
    assert result["stopped"]["seconds"] < 10
    assert result["stopped"]["said"].startswith("Stopped by SIGTERM: ")
    assert result["left behind"] == []


def test_a_mistake_that_workers_notice_is_one_sentence(seen):
    assert seen("mistakes") == {"end": 2, "said": "error: There is no encoder of nothing.\n", "left behind": []}


def test_a_ray_driver_stops_its_actors(seen):
    pytest.importorskip("ray")
    result = seen("ray_stop")
    print(result)
    assert result["end"] == 143
    assert result["seconds"] < 30
    assert "Stopped by SIGTERM: " in result["said"]
    assert result["left behind"] == []
