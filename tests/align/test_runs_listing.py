"""sail-align runs: each run with its state, its steps and its scores; damaged ones are named."""

import json
import os
import sys

import pytest
import torch

from sail_align.align.cli import main
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.claim import claim_run, hold_run
from sail_align.align.runs.folder import content_digest, run_digest
from sail_align.align.runs.listing import RunSummary, list_runs
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError
from sail_align.extract.system.leases import Lease


@pytest.fixture
def plan(make_store):
    return make_plan([make_store("photos")], {"steps": 4, "dim": 4, "preset": "small", "head": "linear"})[0]


@pytest.fixture
def trained(plan, tmp_path):
    run = claim_run(tmp_path / "runs" / "first", plan.record()).path
    fit(plan, run, device=torch.device("cpu"), quiet=True)
    return run


def write_scores(run, digest):
    metrics = [{"name": "top1", "value": 61.25, "chance": 0.5}, {"name": "top5", "value": 80, "chance": 2.5}]
    record = {"dataset": "pets", "task": "classification", "protocol": "p-1", "metrics": metrics}
    records = [record, {"dataset": "dtd", "task": "classification", "error": "gone"}]
    content = {"schema": 2, "run": {"digest": digest}, "encoders": {}, "records": records}
    run.mkdir(parents=True, exist_ok=True)
    (run / "scores.json").write_text(json.dumps({**content, "digest": content_digest(content)}))


@pytest.mark.slow
def test_finished_run_with_its_scores(trained):
    saved = Checkpoint.best(trained).record
    write_scores(trained, saved["digest"])
    write_scores(trained / "scores" / "best-00000002", "another")
    run = RunSummary.read(trained)
    assert (run.state, run.step, run.steps, run.head, run.problem) == ("finished", 4, 4, "linear", "")
    assert run.held_out == saved["scores"]
    assert [(each["dataset"], each["checkpoint"]) for each in run.scores] == [("pets", None), ("pets", "best-00000002")]
    assert run.row()[-1] == "pets 61.2"
    write_scores(trained, "of other weights")
    assert RunSummary.read(trained).row()[-1] == "pets 61.2 (of earlier weights)"


@pytest.mark.slow
def test_states_of_unfinished_runs(plan, trained, tmp_path, monkeypatch):
    settings = plan.record() | {"seed": 7}
    run = claim_run(tmp_path / "runs" / "second", settings).path
    assert RunSummary.read(run).state == "resumable"
    with hold_run(run, run_digest(settings)):
        assert RunSummary.read(run).state == "running"
    lease = Lease(run / "lease" / "fit", 0)
    lease.content = lease.content.replace(b'"machine": "', b'"machine": "other ')
    lease.create()
    assert RunSummary.read(run).state == "running elsewhere"
    os.utime(run / "settings.json", (2_000_000_000, 2_000_000_000))
    assert [each.path.name for each in list_runs(tmp_path / "runs")] == ["second", "first"]
    assert [each.path for each in list_runs(run)] == [run]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("settings.json", "settings.json is damaged"),
        ("checkpoints/step-00000004/model.json", "model.json is damaged"),
        ("scores.json", "scores.json is damaged"),
    ],
)
def test_damaged_run_is_named_and_the_others_are_listed(trained, tmp_path, monkeypatch, capsys, file, message):
    write_scores(trained, "x")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "settings.json").write_text("{}")
    content = (trained / file).read_text()
    (trained / file).write_text(content.replace('"', "'") if file == "settings.json" else content.replace("4", "5"))
    monkeypatch.setattr(sys, "argv", ["sail-align", "runs", str(tmp_path / "runs"), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    runs = {each["path"]: each for each in json.loads(out)["runs"]}
    assert (end.value.code, runs[str(trained)]["state"], len(runs)) == (0, "damaged", 2)
    assert message in runs[str(trained)]["problem"]
    assert f"{trained} is damaged: " in err


def test_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sail-align", "runs"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().out) == (
        0,
        "There are no runs in runs/ yet. Train one with `sail-align fit`.\n",
    )
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list_runs(tmp_path / "nowhere")
