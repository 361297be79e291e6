"""sail-eval's --checkpoint and --json, on a run whose best weights are not its last."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.folder import RunFolder
from sail_align.evaluate import cli
from sail_align.evaluate.score import prepare
from sail_align.extract.errors import UserError

BEST = "scoring step 1, the best on held-out pairs, mean R@1 40.0. Pass --checkpoint last to score step 9."


@pytest.fixture
def squares(world):
    return world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"})


@pytest.fixture
def trained(world, tmp_path, monkeypatch):
    """A run that was best after the first of its nine steps."""
    settings = json.loads((world.run.path / "settings.json").read_bytes())
    encoders = {"image": world.run.image.to_json(), "text": world.run.text.to_json()}
    about = {"architecture": asdict(Architecture("glu", 3, 3, 8)), "settings": settings, **encoders}
    model, run = Architecture(head="glu", image_dim=3, text_dim=3, dim=8).build(), tmp_path / "runs" / "colours-glu"
    for kind, step, r1 in (("best", 1, 40.0), ("step", 9, 30.0)):
        folder = RunFolder(run).checkpoint(step, kind)
        Checkpoint.write(folder, model.state_dict(), about, step=step, finished=step == 9, scores={"r1": r1})
    (run / "settings.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    return Path("runs/colours-glu")


@pytest.fixture
def sail_eval(monkeypatch, capfd):
    """Call the command; return exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sail-eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return call


@pytest.mark.slow
def test_best_is_scored_by_default_and_the_last_by_name(squares, trained, sail_eval):
    code, out, _ = sail_eval("classification", squares, "--run", trained, "--quiet")
    assert (code, out.splitlines()[0]) == (0, BEST)
    assert (trained / "scores.json").is_file()
    best = load_run(trained / "checkpoints" / "best-00000001")
    assert json.loads((trained / "scores.json").read_text())["run"] == {
        "name": "colours-glu",
        "digest": best.digest,
        "unfinished": "",
    }
    code, out, _ = sail_eval("classification", squares, "--checkpoint", "best", "--quiet")
    assert (code, "--checkpoint" in out) == (0, False)
    code, out, _ = sail_eval("classification", squares, "--checkpoint", "last", "--quiet")
    assert (code, "--checkpoint" in out) == (0, False)
    assert f"scoring {trained}/checkpoints/step-00000009 (the newest run) on squares" in out
    assert (trained / "scores" / "step-00000009" / "scores.json").is_file()
    assert sail_eval("trace", trained)[0] == 0


@pytest.mark.slow
def test_best_is_the_last_if_there_is_no_other(squares, trained):
    RunFolder(trained / "checkpoints" / "best-00000001").discard()
    job = prepare(trained, [str(squares)], checkpoint="best")
    assert (job.run.path, job.notes) == (trained, [])


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("", {"checkpoint": "bset"}, "--checkpoint is invalid: got 'bset', expected best or last."),
        ("", {"checkpoint": "best", "model": "open_clip:a@b"}, "--checkpoint best has no effect with --model."),
        ("checkpoints/best-00000001", {"checkpoint": "best"}, "best-00000001 is a checkpoint. Leave it out."),
        ("checkpoints", {"checkpoint": "last"}, "is not a run"),
    ],
)
def test_invalid_choices(squares, trained, which, options, message):
    with pytest.raises(UserError) as refusal:
        prepare(trained / which, [str(squares)], **options)
    assert message in str(refusal.value)


def test_best_is_the_last_if_no_pairs_were_held_out(squares, trained):
    for folder in (trained / "checkpoints").iterdir():
        record = json.loads((folder / "model.json").read_text())
        RunFolder(folder).discard()
        about = {name: record[name] for name in ("architecture", "settings", "image", "text")}
        Checkpoint.write(folder, Architecture("glu", 3, 3, 8).build().state_dict(), about, step=record["step"])
    for which in ("best", "last", None):
        job = prepare(trained, [str(squares)], checkpoint=which)
        assert (job.run.path, job.run.step, job.notes) == (trained, 9, [])


@pytest.mark.slow
def test_results_as_json(squares, trained, sail_eval):
    code, out, err = sail_eval("classification", squares, "--run", trained, "--quiet", "--json")
    scored = json.loads(out)
    (record,) = json.loads((trained / "scores.json").read_text())["records"]
    assert (code, scored["command"], scored["records"]) == (0, "sail-eval classification", [record])
    assert (scored["notes"], scored["report"]) == ([BEST], f"{trained}/report.html")
    assert "top-1" in err
    code, out, _ = sail_eval("all", "--manifest", squares, "--checkpoint", "last", "--quiet", "--json")
    assert (code, [each["dataset"] for each in json.loads(out)["records"]]) == (0, ["squares"])

    both = [trained, trained / "checkpoints" / "step-00000009"]
    code, out, err = sail_eval("report", *both, "--json")
    lines = json.loads(out)["scores"]
    assert (code, "top-1" in err) == (0, True)
    assert next((each["model"], each["metric"], each["score"]) for each in lines) == (
        "colours-glu",
        record["metrics"][0]["name"],
        record["metrics"][0]["value"],
    )
    code, out, _ = sail_eval("compare", *both, "--json")
    (difference, *_) = json.loads(out)["comparisons"][0]["differences"]
    assert (code, difference["first"], difference["interval"]) == (0, record["metrics"][0]["value"], [0.0, 0.0])

    code, out, err = sail_eval("trace", trained, "--json")
    traced = json.loads(out)
    assert (code, traced["counts"]["changed"]) == (0, 0)
    assert len(traced["links"]) == sum(traced["counts"].values()) == len(err.splitlines()) - 1
    (trained / "scores.json").write_text((trained / "scores.json").read_text().replace('"task"', '"tsak"', 1))
    code, out, _ = sail_eval("trace", trained, "--json")
    assert (code, json.loads(out)["counts"]["changed"]) == (1, 1)


@pytest.mark.slow
def test_failed_set_is_in_the_document(squares, world, trained, sail_eval, tmp_path):
    broken = world.class_folders("broken", [("red", "red"), ("blue", "blue")], {"kind": "classification"})
    (tmp_path / "broken" / "red" / "0.png").write_bytes(b"no picture")
    code, out, _ = sail_eval("all", "--manifest", broken, "--run", trained, "--quiet", "--json")
    assert code == 1
    assert "cannot be used" in json.loads(out)["records"][0]["error"]
