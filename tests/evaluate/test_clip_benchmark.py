"""LAION's clip-benchmark, its own code on its own form of data, gives a run the numbers that sail-eval gives it."""

import json
from pathlib import Path

import pytest
from released_file import save_encoders
from small_world import SHADES, captions_of, save_run, write_captioned, write_classes
from tars import write_tar
from typer.testing import CliRunner

from sail_align.align.runs.checkpoint import load_run
from sail_align.evaluate import clip_benchmark
from sail_align.evaluate.cli import app
from sail_align.evaluate.results.scores import RunScores
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError

ROWS = 30


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text = save_encoders(tmp_path / "encoders")
    image, text = (
        ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load(),
        TextEncoderConfig(f"hf:{text}", pooling="mean").load(),
    )
    return save_run(Path("runs/photos-glu"), image.identity, text.identity)


def theirs(run, folder, *words):
    """Return the metrics in the file that clip-benchmark writes."""
    pytest.importorskip("clip_benchmark.cli", reason="clip-benchmark is not installed")
    options = ["--num_workers", "0", "--batch_size", "7", "--no_amp", *words]
    result = CliRunner().invoke(
        app, ["clip-benchmark", str(run), "--dataset", "wds/it", "--dataset_root", folder, *options]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    (written,) = Path().glob(f"it_{load_run(run).digest[:12]}_photos-glu_en_*.json")
    return json.loads(written.read_bytes())["metrics"]


def ours(run, task, manifest):
    result = CliRunner().invoke(app, [task, str(manifest), "--run", str(run), "--device", "cpu", "--quiet"])
    assert result.exit_code == 0, (result.output, result.exception)
    (record,) = RunScores.read(run).records
    return {metric["name"]: metric["value"] / 100 for metric in record["metrics"]}


def write_webdataset(folder, pictures, **texts):
    """Write one shard of their form; `pictures` are (path, extension, text)."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    members = []
    for number, (path, extension, text) in enumerate(pictures):
        key = f"s{number:07d}"
        members += [(f"{key}.png", path.read_bytes()), (f"{key}.{extension}", text.encode())]
    write_tar(folder / "test" / "0.tar", members)
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return str(folder)


@pytest.mark.slow
def test_retrieval_agrees(run, tmp_path):
    mine = ours(run, "retrieval", write_captioned(tmp_path / "photos", ROWS))
    pictures = sorted((tmp_path / "photos" / "images").iterdir())
    rows = [(path, "txt", "\n".join(captions_of(row))) for row, path in enumerate(pictures)]
    folder = write_webdataset(tmp_path / "wds", rows, dataset_type=["retrieval"])
    yours = theirs(run, folder, "--task", "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    for k in (1, 5, 10):
        assert mine[f"t2i_r{k}"] == pytest.approx(yours[f"image_retrieval_recall@{k}"], abs=1e-4)
        assert mine[f"i2t_r{k}"] == pytest.approx(yours[f"text_retrieval_recall@{k}"], abs=1e-4)
    assert 0 < mine["t2i_r5"] < 1


@pytest.mark.slow
def test_classification_agrees(run, tmp_path):
    mine = ours(run, "classification", write_classes(tmp_path / "classes"))
    names = sorted(SHADES)
    rows = [
        (path, "cls", str(label))
        for label, name in enumerate(names)
        for path in sorted((tmp_path / "classes" / "val" / name).iterdir())
    ]
    folder = write_webdataset(
        tmp_path / "wds",
        rows,
        classnames=names,
        zeroshot_classification_templates=["a {c}", "the {c} on the bench"],
    )
    yours = theirs(run, folder, "--task", "zeroshot_classification")
    assert mine["top1"] == pytest.approx(yours["acc1"], abs=1e-4)
    assert mine["top5"] == pytest.approx(yours["acc5"], abs=1e-4)
    assert mine["mean_per_class"] == pytest.approx(yours["mean_per_class_recall"], abs=1e-4)
    assert 0 < mine["top1"] < 1


def test_options_that_choose_another_model_are_rejected(run):
    for words in (["--model_type", "open_clip"], ["--pretrained=openai"], ["--model", "x"], ["--pretrained_m", "x"]):
        result = CliRunner().invoke(app, ["clip-benchmark", str(run), *words])
        assert str(result.exception) == f"{words[0]} chooses another model than {run}. Remove it."


def test_missing_clip_benchmark_names_the_extra(run, monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(clip_benchmark.importlib, "import_module", import_module)
    problem = CliRunner().invoke(app, ["clip-benchmark", str(run)]).exception
    assert isinstance(problem, UserError)
    assert "pip install 'sail-align[eval]'" in str(problem)


@pytest.mark.slow
def test_clip_benchmark_loads_the_registered_model(run):
    pytest.importorskip("clip_benchmark.models", reason="clip-benchmark is not installed")
    from clip_benchmark.models import load_clip

    clip_benchmark.register()
    model, transform, tokenizer = load_clip("sail", str(run), "", None, "cpu")
    assert (transform, tokenizer) == (model.preprocess, model.tokenizer)
