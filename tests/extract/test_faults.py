"""Stores are byte-identical after any crash, and no committed shard is encoded again."""

import json

import pytest

from tests.extract import faulty_runs

pytestmark = pytest.mark.slow


@pytest.fixture
def play(pictures, start_warm):
    """Run a scenario of faulty_runs.py and return its result."""

    def run(scenario: str):
        process = start_warm(faulty_runs.play, pictures, scenario, output=pictures / "output.txt")
        assert process.wait() == 0, process.output
        return json.loads((pictures / "result.json").read_text())

    return run


def test_store_is_byte_identical_after_random_kills(play):
    result = play("kills")
    print(result)
    assert result["kills"] >= 10
    assert result["end"] == 0
    assert result["identical"]
    assert result["same batches"]
    assert result["encoded again"] == result["lost in flight"]
    assert result["most lost in a kill"] <= 2  # one being encoded, one being written


def test_two_simultaneous_commands_share_the_work(play):
    result = play("two_at_once")
    assert result == {
        "ends": [0] * 4,
        "identical": [True, True],
        "most often encoded": [1, 1],
        "same batches": True,
    }


def test_sigterm_and_ctrl_c_stop_a_run_cleanly_within_seconds(play):
    result = play("signals")
    for name, label, code in [("SIGTERM", "SIGTERM", 143), ("SIGINT", "Ctrl-C", 130)]:
        stop = result[name]
        assert stop["end"] == code
        assert stop["seconds"] < 5
        assert stop["stderr"].startswith(f"Stopped by {label}: ")
        assert stop["stderr"].endswith(". Rerun the same command to continue.\n")
        assert stop["stderr"].count("\n") == 1
        assert stop["left behind"] == []
        assert stop["log"]["end"] == label
        assert 0 < stop["log"]["encoded"] < 1_800
        assert stop["log"]["encoded"] + stop["log"]["left"] == 1_800
    assert result["end"] == 0
    assert result["identical"]
    assert result["encoded again"] <= 1


def test_workers_survive_the_kill_of_one_and_stop_with_their_parent(play):
    result = play("workers")
    assert result["end"] == 0
    assert "was killed by SIGKILL. Its shards are left to 2 other workers." in result["stderr"]
    assert result["identical"]
    assert result["encoded again"] <= 2
    assert result["stopped"]["end"] == 143
    assert result["stopped"]["seconds"] < 10
    assert result["stopped"]["stderr"].startswith("Stopped by SIGTERM: ")
    assert result["left behind"] == []


def test_user_error_of_a_worker_is_printed_once(play):
    assert play("user_error") == {"end": 2, "stderr": "error: There is no encoder of nothing.\n", "left behind": []}


@pytest.mark.thorough
def test_ray_driver_stops_its_actors(play):
    pytest.importorskip("ray")
    result = play("ray_stop")
    print(result)
    assert result["end"] == 143
    assert result["seconds"] < 30
    assert "Stopped by SIGTERM: " in result["stderr"]
    assert result["left behind"] == []
