"""A run made of published heads is scored, and reported, like one trained here."""

from pathlib import Path

import pytest
from released_file import released_tensors, save_encoders, save_released
from small_world import write_captioned
from typer.testing import CliRunner

from sail_align.align.cli import app as align
from sail_align.align.runs.checkpoint import load_run
from sail_align.evaluate.cli import app as evaluate
from sail_align.evaluate.results.scores import RunScores

pytestmark = pytest.mark.slow


def test_imported_run_is_scored_and_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text = save_encoders(tmp_path)
    file = save_released(tmp_path / "sail.pt", released_tensors())
    options = ["--image-pooling", "cls+mean", "--text-pooling", "mean", "--device", "cpu"]
    imported = CliRunner().invoke(
        align, ["import-released", str(file), "--encoders", f"hf:{image},hf:{text}", *options]
    )
    assert imported.exit_code == 0, imported.output
    manifest = write_captioned(tmp_path / "photos")
    scored = CliRunner().invoke(
        evaluate, ["retrieval", str(manifest), "--run", "runs/sail", "--device", "cpu", "--quiet"]
    )
    assert scored.exit_code == 0, scored.output
    scores = RunScores.read(Path("runs/sail")).content
    assert scores["run"]["digest"] == load_run("runs/sail").digest
    assert scores["records"][0]["items"] == 12
    report = Path("runs/sail/report.html").read_text()
    assert "imported from" in report
    assert load_run("runs/sail").settings["imported"]["sha256"][:12] in report
