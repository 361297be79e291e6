"""A sample of the injected faults; `make faults` injects many more."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import injections
from tests.faults.jobs import JOBS

SAMPLE = 36


def play_sample(folder: Path) -> None:
    """Inject a sample of faults, and write how they ended to `outcomes.json`."""
    inputs, runs = injections.prepare(list(JOBS), folder)
    chosen = injections.by_rarity(injections.list_injections(runs))[:SAMPLE]
    outcomes = injections.inject_all(chosen, runs, inputs, folder, workers=1)
    content = [[each.name, each.end, each.problem, each.output] for each in outcomes]
    (folder / "outcomes.json").write_text(json.dumps(content))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="paths of descriptors are read from /proc")
def test_jobs_recover_from_faults_of_the_file_system(start_warm, tmp_path):
    process = start_warm(play_sample, tmp_path, output=tmp_path / "output.txt")
    assert process.wait() == 0, process.output
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert [each for each in outcomes if each[2]] == []
    ends = Counter(end for _, end, *_ in outcomes)
    print(ends)
    assert len({name for name, *_ in outcomes}) == SAMPLE
    assert all(ends[end] for end in injections.ENDS)
