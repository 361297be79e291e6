"""Named checkpoints and exports have their own scores, which never replace those of a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from small_world import save_run
from typer.testing import CliRunner

from sail_align.align.cli import app as align
from sail_align.align.hub.folder import read_hub_folder
from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.folder import RunFolder, record_digest
from sail_align.evaluate.cli import app
from sail_align.evaluate.models import Encoders, RunError
from sail_align.evaluate.results.scores import unfinished
from sail_align.extract.errors import UserError


@pytest.fixture
def squares(world):
    rows = [("red", "red"), ("green", "green"), ("blue", "yellow"), ("pink", "cyan")]
    return world.class_folders("squares", rows, {"kind": "classification"})


@pytest.fixture
def saved(world, monkeypatch):
    """A finished run, scored by nobody, whose best checkpoint has other weights."""
    monkeypatch.chdir(world.folder)
    run = save_run(Path("runs/glu"), world.run.image, world.run.text)
    record = json.loads((RunFolder(run).last / "model.json").read_bytes())
    about = {name: record[name] for name in ("architecture", "image", "text", "settings")}
    model = Architecture(**about["architecture"]).build()
    best = RunFolder(run).checkpoint(4, "best")
    Checkpoint.write(best, model.state_dict(), about, step=4, finished=False, scores={"r1": 9.0})
    return run, best


def typed(*words, program=app):
    result = CliRunner().invoke(program, [*map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def score(manifest, path):
    return typed("classification", manifest, "--run", path, "--device", "cpu", "--quiet")


@pytest.mark.slow
def test_checkpoint_scores_outlive_the_checkpoint(saved, squares):
    run, best = saved
    score(squares, run)
    before = (run / "scores.json").read_bytes()
    said = score(squares, best)
    assert said.startswith(f"scoring {best} on squares\n")
    assert said.endswith(
        "wrote runs/glu/scores/best-00000004/scores.json and runs/glu/scores/best-00000004/report.html\n"
    )
    assert (run / "scores.json").read_bytes() == before
    scores, record = (
        json.loads((run / "scores" / best.name / f"{name}.json").read_bytes()) for name in ("scores", "checkpoint")
    )
    assert scores["run"] == {"name": "glu, step 4", "digest": load_run(best).digest, "unfinished": ""}
    assert record["digest"] == record_digest(record) == scores["run"]["digest"]
    assert record["settings"]["store_digests"] == ["c" * 64]
    card = ModelCard.load(export(best) / "README.md")
    assert unfinished(read_hub_folder(Path("hub"))) == "step 4 of 9"
    assert (card.data.model_name, card.data.eval_results[0].metric_value) == (
        "glu",
        round(scores["records"][0]["metrics"][0]["value"], 4),
    )

    RunFolder(best).discard()
    assert typed("compare", run, best).startswith(f"first: {run}, second: {best}\n")
    for named in (best, best.resolve(), run / "scores" / best.name):
        rows = [line.split("  ")[0] for line in typed("report", run, named).splitlines()]
        assert rows[3:5] == ["glu", "glu, step 4"]
    assert "<title>glu, step 4: zero-shot" in (run / "scores" / best.name / "report.html").read_text()


def test_checkpoint_outside_its_run_is_rejected(saved, squares, tmp_path):
    shutil.copytree(saved[1], "kept")
    result = CliRunner().invoke(app, ["classification", str(squares), "--run", "kept"])
    assert str(result.exception) == "kept is a checkpoint outside its run. Move it back into that run's checkpoints/."


def export(run, folder="hub", form="hub-folder"):
    typed("export", run, "--to", form, "--out", folder, program=align)
    return Path(folder)


@pytest.mark.slow
def test_export_scores_like_its_run_and_is_not_modified(saved, squares):
    run, _ = saved
    score(squares, run)
    hub = export(run)
    before = {path: path.read_bytes() for path in hub.iterdir()}
    config = json.loads(before[hub / "config.json"])
    folder = Path(f"runs/hub-{config['run_digest'][:8]}")
    assert score(squares, hub).endswith(f"wrote {folder}/scores.json and {folder}/report.html\n")
    assert {path: path.read_bytes() for path in hub.iterdir()} == before
    ours, theirs = (json.loads((path / "scores.json").read_bytes()) for path in (run, folder))
    assert theirs["run"] == {**ours["run"], "name": "hub"}
    for name in ("metrics", "protocol", "data", "stores", "run"):
        assert theirs["records"][0][name] == ours["records"][0][name]
    assert json.loads((folder / "checkpoint.json").read_bytes()) == config
    assert "store cccccccccccc" in (folder / "report.html").read_text()
    assert typed("compare", run, hub).startswith(f"first: {run}, second: {hub}\n")
    shutil.rmtree(hub)
    assert [row.split("  ")[0] for row in typed("report", run, folder).splitlines()][3:5] == ["glu", folder.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "config.json",
            b"{",
            "hub/config.json is damaged: its content is not what was written. Export or download it again.",
        ),
        (
            "config.json",
            b'{"model_type": "bert"}',
            "hub/config.json was not written by `sail-align export`. Pass a folder that was.",
        ),
        (
            "model.safetensors",
            b"",
            "hub/model.safetensors is damaged: its content is not what was written. Export or download it again.",
        ),
        ("config.json", None, "hub is not a run. Train one with `sail-align fit`."),
    ],
)
def test_incomplete_export_is_rejected(saved, squares, file, content, sentence):
    hub = export(saved[0])
    (hub / file).unlink() if content is None else (hub / file).write_bytes(content)
    result = CliRunner().invoke(app, ["classification", str(squares), "--run", "hub"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == sentence


def test_encoder_missing_from_an_export_is_named(run):
    spec = replace(run.image.spec, source={"config": "0"})
    encoders = Encoders(replace(run, image=replace(run.image, spec=spec)))
    with pytest.raises(
        RunError, match="with the image encoder colour-image of a local folder, which is not part of an export"
    ):
        _ = encoders.image
