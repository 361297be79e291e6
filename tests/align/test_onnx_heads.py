"""ONNX graphs of heads give the same embeddings in ONNX Runtime as in PyTorch."""

from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from small_world import save_run
from typer.testing import CliRunner

from sail_align.align.cli import app
from sail_align.align.hub import onnx_heads
from sail_align.align.runs.checkpoint import load_run
from sail_align.extract.errors import UserError

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")

IMAGE_DIM, TEXT_DIM = 12, 7
SHAPES = {
    "mlp": {"head": "mlp", "image_dropout": 0.5},
    "glu with a linear path and roots": {"head": "glu", "linear_path": True, "image_power": 0.5, "text_dropout": 0.3},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**shape) -> Path:
        identities = (fakes.identity("image", dim=IMAGE_DIM), fakes.identity("text", dim=TEXT_DIM))
        return save_run(Path("runs/photos"), *identities, **shape)

    return make


def export(run, *words):
    return CliRunner().invoke(app, ["export", str(run), "--to", "onnx", *words])


def check_metadata(graph, path, side):
    onnx.checker.check_model(graph, full_check=True)
    about = {entry.key: entry.value for entry in graph.metadata_props}
    run = load_run(path)
    assert about["run_digest"] == run.digest
    assert about["encoder_fingerprint"] == getattr(run, side).spec.fingerprint
    assert float(about["logit_scale"]) == pytest.approx(20)
    assert str(Path(onnx_heads.__file__).parent).encode() not in graph.SerializeToString()
    assert b".py" not in graph.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_head_gives_the_same_embeddings(run, shape):
    path = run(**shape)
    result = export(path, "--out", "onnx")
    assert result.exit_code == 0, result.output
    assert "wrote onnx: image_head.onnx and text_head.onnx, also for float16, within" in result.output
    model = load_run(path).model
    rng = np.random.default_rng(3)
    for side, dim, encode in (("image", IMAGE_DIM, model.encode_image), ("text", TEXT_DIM, model.encode_text)):
        for ending, dtype in (("", np.float32), ("_float16", np.float16)):
            session = onnxruntime.InferenceSession(f"onnx/{side}_head{ending}.onnx")
            for batch in (1, 2, 50):
                features_BD = rng.normal(size=(batch, dim)).astype(dtype)
                (found_BE,) = session.run(None, {"features": features_BD})
                assert found_BE.dtype == np.float32
                with torch.no_grad():
                    expected_BE = encode(torch.from_numpy(features_BD)).numpy()
                np.testing.assert_allclose(found_BE, expected_BE, atol=1e-6)
            check_metadata(onnx.load(f"onnx/{side}_head{ending}.onnx"), path, side)


@pytest.mark.slow
def test_differing_graph_is_not_written(run, monkeypatch):
    path = run()
    monkeypatch.setattr(onnx_heads, "_write_head", lambda *_: 1e-3)
    assert "differ from PyTorch's by 0.001" in str(export(path).exception)
    assert not list(Path("exports").iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_library_is_reported(run, monkeypatch, library):
    path = run()

    def import_module(name):
        if name == library:
            raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", import_module)
    problem = export(path).exception
    assert isinstance(problem, UserError)
    assert str(problem) == f"--to onnx needs {library}. Install it with: pip install 'sail-align[onnx]'."


@pytest.mark.slow
def test_licence_is_rejected_for_onnx(run):
    assert "--licence has no effect with --to onnx" in str(export(run(), "--licence", "mit").exception)
