"""sail-eval as typed: what it prints, what it writes, and how it ends."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import typer
import yaml

from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.folder import RunFolder
from sail_align.evaluate import cli
from sail_align.evaluate.results.reported import Reported
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import packaged_manifests


@pytest.fixture
def sail_eval(world, run, monkeypatch, capsys, tmp_path):
    """Call the command in an empty folder with `run` as the run of any path; return exit code, stdout, stderr."""
    monkeypatch.setattr("sail_align.align.runs.checkpoint.load_run", lambda path: run)
    monkeypatch.setattr("sail_align.align.runs.folder.RunFolder.newest", lambda: run.path)
    monkeypatch.setattr("sail_align.extract.manifest.packaged_manifests", dict)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sail-eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def squares(world):
    return world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"})


def test_each_task_has_a_command():
    commands = typer.main.get_command(cli.app).commands
    assert set(all_tasks()) == set(commands) - {"all", "clip-benchmark", "mteb", "demo", "report", "compare", "trace"}


@pytest.mark.slow
def test_help_is_fast_and_does_not_import_torch():
    started = time.monotonic()
    code = "import sys; sys.argv = ['sail-eval', '--help']\nfrom sail_align.evaluate.cli import main\n"
    check = "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    shown = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert "winoground" in shown.stdout
    assert time.monotonic() - started < 5  # under a second on an idle machine


@pytest.mark.slow
def test_all_prints_a_table_and_writes_a_report(sail_eval, squares, run):
    code, out, _ = sail_eval("all", "--manifest", squares, "--quiet")
    assert code == 0
    assert f"scoring {run.path} (the newest run)" in out
    lines = out.splitlines()
    assert lines[1].split() == ["data", "set", "task", "n", "metric", "score", "chance", "95%", "interval"]
    assert lines[3].split() == ["squares", "classification", "2", "top-1", "100.0", "50.0", "100.0", "–", "100.0"]
    assert (run.path / "report.html").is_file()


@pytest.mark.slow
def test_scores_have_provenance(sail_eval, squares, run):
    sail_eval("classification", squares, "--run", run.path, "--quiet")
    scores = json.loads((run.path / "scores.json").read_bytes())
    record = scores["records"][0]
    assert scores["run"] == {"name": "colours-linear", "digest": run.digest, "unfinished": ""}
    assert scores["encoders"]["image"]["fingerprint"] == run.image.spec.fingerprint
    assert record["protocol"].startswith("classification/prompt-ensemble@2/squares/classes=source:2:")
    assert record["protocol"].endswith("/templates=a-photo-of-a-{}.")
    assert record["run"] == run.digest
    assert record["data"]["rows"] == record["items"] == 2
    assert len(record["data"]["digest"]) == 64
    assert set(record["stores"]) == {"images", "prompts"}
    assert all(len(store["digest"]) == 64 for store in record["stores"].values())
    assert record["metrics"][0] == {
        "name": "top1",
        "label": "top-1",
        "value": 100.0,
        "chance": 50.0,
        "interval": [100.0, 100.0],
        "unit": "%",
    }


@pytest.mark.slow
def test_scoring_one_set_again_keeps_the_others(sail_eval, squares, world, run):
    pairs = world.squares("pairs", [("red", "red"), ("green", "green")], {"kind": "winoground"})
    sail_eval("all", "--manifest", squares, "--manifest", pairs, "--quiet")
    sail_eval("winoground", pairs, "--quiet")
    records = json.loads((run.path / "scores.json").read_bytes())["records"]
    assert [record["dataset"] for record in records] == ["squares", "pairs"]


@pytest.mark.slow
def test_scores_of_an_earlier_checkpoint_are_dropped(sail_eval, squares, run):
    path = run.path / "scores.json"
    sail_eval("classification", squares, "--quiet")
    older = json.loads(path.read_bytes())
    older["run"]["digest"] = "e" * 64
    older["records"][0]["dataset"] = "another"
    older.pop("digest")
    path.write_text(json.dumps(older))
    _, _, said = sail_eval("classification", squares, "--quiet")
    assert f"{path}: 1 scores of another checkpoint, encoder or version are replaced." in said
    assert [record["dataset"] for record in json.loads(path.read_bytes())["records"]] == ["squares"]


@pytest.mark.slow
def test_corrupt_set_does_not_stop_the_others(sail_eval, squares, world, run, tmp_path):
    broken = world.class_folders("broken", [("red", "red"), ("blue", "blue")], {"kind": "classification"})
    (tmp_path / "broken" / "red" / "0.png").write_bytes(b"no picture")
    code, out, _ = sail_eval("all", "--manifest", broken, "--manifest", squares, "--quiet")
    assert code == 1
    row = next(line for line in out.splitlines() if line.startswith("broken"))
    assert "ERROR: 1 of 2 images of broken cannot be used. The first is 'red/0.png' (undecodable)" in row
    assert any(line.split()[:4] == ["squares", "classification", "2", "top-1"] for line in out.splitlines())
    assert "not scored" in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_set_too_small_for_representation_is_skipped(sail_eval, world, run):
    few = world.squares("few", [("red", "red"), ("green", "green")], {"kind": "retrieval"})
    code, out, err = sail_eval("all", "--manifest", few, "--quiet")
    assert code == 0
    assert "skipped: few has 2 images with a caption. Representation needs 5." in err
    assert "ERROR" not in out
    tasks = {record["task"] for record in json.loads((run.path / "scores.json").read_bytes())["records"]}
    assert "retrieval" in tasks
    assert "representation" not in tasks
    code, _, err = sail_eval("representation", few, "--quiet")
    assert (code, err) == (2, "error: few has 2 images with a caption. Representation needs 5.\n")


@pytest.mark.slow
def test_task_command_stops_at_an_error_and_keeps_earlier_scores(sail_eval, squares, world, run, tmp_path):
    broken = world.class_folders("broken", [("red", "red"), ("blue", "blue")], {"kind": "classification"})
    (tmp_path / "broken" / "red" / "0.png").write_bytes(b"no picture")
    code, out, err = sail_eval("classification", squares, broken, "--quiet")
    assert code == 2
    assert err.startswith("error: 1 of 2 images of broken cannot be used")
    assert err.count("\n") == 1
    assert "top-1" in out
    assert [record["dataset"] for record in json.loads((run.path / "scores.json").read_bytes())["records"]] == [
        "squares"
    ]


@pytest.mark.slow
def test_error_does_not_replace_scores(sail_eval, squares, run, tmp_path):
    sail_eval("all", "--manifest", squares, "--quiet")
    good = (run.path / "scores.json").read_bytes()
    for name in ("red", "green"):
        (tmp_path / "squares" / name / "0.png").rename(tmp_path / "squares" / name / "1.png")
    code, out, _ = sail_eval("all", "--manifest", squares, "--quiet")
    assert code == 1
    assert "ERROR: " in out
    assert (run.path / "scores.json").read_bytes() == good
    assert "closest to it" in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_renamed_run_keeps_its_scores(sail_eval, squares, world, run):
    pairs = world.squares("pairs", [("red", "red"), ("green", "green")], {"kind": "winoground"})
    sail_eval("classification", squares, "--quiet")
    path = run.path / "scores.json"
    before = json.loads(path.read_text().replace('"colours-linear"', '"before"'))
    before.pop("digest")
    path.write_text(json.dumps(before))
    sail_eval("winoground", pairs, "--quiet")
    scores = json.loads(path.read_bytes())
    assert scores["run"]["name"] == "colours-linear"
    assert [record["dataset"] for record in scores["records"]] == ["squares", "pairs"]


def test_missing_encoder_stops_all_sets_at_once(sail_eval, squares, monkeypatch):
    def refuse(recorded, device, **_):
        raise UserError("It is not in the hub's cache.")

    monkeypatch.setattr("sail_align.evaluate.models.load_recorded", refuse)
    code, _, err = sail_eval("all", "--manifest", squares)
    assert code == 2
    assert "colours-linear cannot be used: It is not in the hub's cache." in err


@pytest.mark.slow
def test_report_is_rebuilt_from_the_run_folder(sail_eval, squares, run):
    sail_eval("all", "--manifest", squares, "--quiet")
    first = (run.path / "report.html").read_bytes()
    (run.path / "report.html").unlink()
    code, out, _ = sail_eval("report", run.path)
    assert code == 0
    assert "top-1" in out
    assert (run.path / "report.html").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "begins"), [("html", "<!doctype"), ("md", "| "), ("tex", "% "), ("csv", "model,")])
def test_out_writes_the_format_of_its_ending(sail_eval, squares, run, tmp_path, ending, begins):
    sail_eval("all", "--manifest", squares, "--quiet")
    shutil.copytree(run.path, tmp_path / "other")
    code, out, _ = sail_eval("report", run.path, tmp_path / "other", "--out", tmp_path / "new" / f"table.{ending}")
    assert (code, out) == (0, f"wrote {tmp_path / 'new' / f'table.{ending}'}\n")
    written = (tmp_path / "new" / f"table.{ending}").read_text()
    assert written.startswith(begins)
    assert "colours-linear" in written
    assert "other" in written


@pytest.mark.slow
def test_scores_of_papers_are_printed(sail_eval, squares, run, monkeypatch):
    assert "reported" not in sail_eval("all", "--manifest", squares, "--quiet")[1]
    (record,) = json.loads((run.path / "scores.json").read_bytes())["records"]
    told = (Reported("Theirs", "a table", {(record["protocol"], "top1", 2): 33.25}),)
    monkeypatch.setattr(Reported, "read_all", lambda: told)
    for arguments in (["all", "--manifest", squares, "--quiet"], ["report", run.path]):
        _, out, _ = sail_eval(*arguments)
        assert re.search(r"Theirs \(a table\) \* +33.25\n", out)
        assert "* reported by the paper, not measured here." in out


@pytest.mark.slow
def test_several_runs_are_printed_side_by_side(sail_eval, squares, run, tmp_path):
    sail_eval("all", "--manifest", squares, "--quiet")
    shutil.copytree(run.path, tmp_path / "other")
    code, out, _ = sail_eval("report", run.path, tmp_path / "other")
    assert code == 0
    assert [line.split() for line in out.splitlines()[:2]] == [["model", "squares"], ["top-1", "(a)"]]
    assert out.count("100.0 ± 0.0") == 2
    assert f"wrote {tmp_path / 'other' / 'report.html'}" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["retrieval", "SQUARES"], "Manifest 'squares' is for classification. Use `sail-eval classification`."),
        (["retrieval", "no-such"], "Manifest 'no-such' is unknown"),
        (
            ["classification", "SQUARES", "--protocol", "openai-8"],
            "Protocol 'openai-8' of squares is invalid: expected openai-80 or",
        ),
        (["compare", "RUN"], "One run cannot be compared: got only"),
        (
            ["classification", "SQUARES", "--data-root", "nowhere"],
            "'squares' are not in nowhere. See `sail-extract check /",
        ),
        (["report", "RUN"], "has no scores.json. Run `sail-eval all --run"),
        (
            ["report", "SCORED", "--out", "table.docx"],
            "--out table.docx is invalid: expected a file that ends in .html,",
        ),
        (["report", "SCORED", "--out", "/dev/null/table.md"], "/dev/null/table.md cannot be written ("),
        (["all", "--manifest", "SQUARES", "--device", "cuda:9"], "Device 'cuda:9' is not available on this machine"),
    ],
)
def test_invalid_arguments_exit_with_2_and_one_line(sail_eval, squares, run, arguments, sentence):
    named = {"SQUARES": squares, "RUN": run.path}
    if "SCORED" in arguments:
        sail_eval("all", "--manifest", squares, "--quiet")
        named["SCORED"] = run.path
    code, _, err = sail_eval(*(named.get(argument, argument) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_training_manifest_is_rejected(sail_eval, squares):
    content = yaml.safe_load(squares.read_text())
    del content["task"]
    squares.write_text(yaml.safe_dump({**content, "purpose": "train"}))
    code, _, err = sail_eval("all", "--manifest", squares)
    assert code == 2
    assert "is for training. Give an evaluation set. To score on data of your own, add `task: {kind: retrieval}`" in err


@pytest.fixture
def packaged(squares, monkeypatch, tmp_path):
    """Packaged manifests: one whose data are not here, and one of the demo's."""
    far, drawn = tmp_path / "far.yaml", tmp_path / "demo-pairs.yaml"
    far.write_text(squares.read_text().replace("name: squares", "name: far").replace("source:", "source:\n  root: far"))
    drawn.write_bytes(packaged_manifests()["demo-pairs"].read_bytes())
    found = {"far": far, "demo-pairs": drawn}
    monkeypatch.setattr("sail_align.extract.manifest.packaged_manifests", lambda: found)


def test_all_without_data_explains_how_to_get_it(sail_eval, packaged, run, monkeypatch):
    monkeypatch.setattr("sail_align.extract.sources.demo.source.find_spec", lambda name: None)
    code, out, _ = sail_eval("all", "--quiet")
    assert code == 0
    assert out.splitlines() == [
        "2 published sets are not here; `sail-extract check` lists them.",
        "nothing to score: get one of these, or describe your own pictures (docs/data.md) for --manifest.",
    ]
    assert not (run.path / "scores.json").exists()


@pytest.mark.slow
def test_all_skips_demo_sets_for_runs_not_trained_on_the_demo(sail_eval, squares, packaged, run):
    code, out, _ = sail_eval("all", "--manifest", squares, "--quiet")
    assert code == 0
    assert "skipped: demo-pairs. They are drawings, and this run does not seem to be trained on the demo" in out
    assert "on squares\n" in out
    run.settings["stores"] = ["elsewhere/demo.zarr"]
    _, out, _ = sail_eval("all", "--manifest", squares, "--quiet")
    assert "skipped" not in out
    assert "on demo-pairs, squares\n" in out


@pytest.mark.slow
def test_protocol_option_adds_a_record(sail_eval, squares, run):
    sail_eval("classification", squares, "--quiet")
    code, _, _ = sail_eval("classification", squares, "--protocol", "class-name", "--quiet")
    assert code == 0
    records = json.loads((run.path / "scores.json").read_bytes())["records"]
    assert [record["protocol"].rpartition("/")[2] for record in records] == [
        "templates=a-photo-of-a-{}.",
        "templates={}",
    ]
    sail_eval("classification", squares, "--quiet")
    assert len(json.loads((run.path / "scores.json").read_bytes())["records"]) == 2
    assert (run.path / "report.html").read_text().count("n = 2") == 2


@pytest.mark.slow
def test_newest_run_is_scored(squares, world, monkeypatch, capsys, tmp_path):
    """Nothing of the run is a stand-in here, only the encoders that it names."""
    older, saved = tmp_path / "runs" / "later-in-the-alphabet", tmp_path / "runs" / "colours-glu"
    model = Architecture(head="glu", image_dim=3, text_dim=3, dim=8).build()
    settings = json.loads((world.run.path / "settings.json").read_bytes())
    encoders = {"image": world.run.image.to_json(), "text": world.run.text.to_json()}
    about = {"architecture": asdict(Architecture("glu", 3, 3, 8)), "settings": settings, **encoders}
    for folder in (older, saved):
        Checkpoint.write(RunFolder(folder).checkpoint(1), model.state_dict(), about, step=1, finished=False)
        (folder / "settings.json").write_text(json.dumps(settings))
    os.utime(older / "checkpoints" / "step-00000001" / "model.json", (0, 0))
    monkeypatch.setattr(sys, "argv", ["sail-eval", "classification", str(squares), "--quiet"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "scoring runs/colours-glu (the newest run), unfinished: step 1 of 9 on squares\n" in capsys.readouterr().out
    assert "unfinished: step 1 of 9" in (saved / "report.html").read_text()
    assert json.loads((saved / "scores.json").read_bytes())["run"]["digest"] == load_run(saved).digest


def test_demo_runs_the_three_stages(sail_eval, squares, run, monkeypatch):
    typed = []
    for stage in ("extract", "align"):
        monkeypatch.setattr(f"sail_align.{stage}.cli.app", lambda words, **_: typed.append(words[:2]))
    monkeypatch.setattr("sail_align.extract.manifest.packaged_manifests", lambda: {"squares": squares})
    code, out, err = sail_eval("demo", "--json", "--quiet")
    assert code == 0
    assert typed == [["run", "demo"], ["fit", "--features"]]
    assert "$ sail-extract run demo\n$ sail-align fit --features features/demo.zarr\n$ sail-eval all\n" in err
    assert json.loads(out)["command"] == "sail-eval demo"
