"""mteb, its own code on local tasks, gives a run the numbers that sail-eval gives it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from released_file import save_encoders
from small_world import SHADES, captions_of, draw, save_run, write_captioned, write_classes
from typer.testing import CliRunner

from sail_align.align.runs.checkpoint import load_run
from sail_align.evaluate import mteb_model
from sail_align.evaluate.cli import app
from sail_align.evaluate.mteb_model import MtebModel, find_tasks
from sail_align.evaluate.results.scores import RunScores
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError

pytestmark = pytest.mark.slow
ROWS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mteb")
    image, text = save_encoders(folder / "encoders")
    encoders = (
        ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load(),
        TextEncoderConfig(f"hf:{text}", pooling="mean").load(),
    )
    return save_run(folder / "runs" / "photos-glu", *(encoder.identity for encoder in encoders))


@pytest.fixture(scope="module")
def model(run):
    return MtebModel(str(run), None, device="cpu")


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """Return classes of tasks like those of MIEB, whose data are local, and the manifests of the same data."""
    pytest.importorskip("mteb", reason="the extra mteb is not installed")
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    folder = tmp_path_factory.mktemp("data")
    manifests = {
        "photos": write_captioned(folder / "photos", ROWS),
        "classes": write_classes(folder / "classes", ["a {}"]),
    }
    photos = [Image.open(path) for path in sorted((folder / "photos" / "images").iterdir())]

    def about(name, kind, category, score):
        return TaskMetadata(
            name=name,
            type=kind,
            category=category,
            main_score=score,
            modalities=["image", "text"],
            description="Noise.",
            dataset={"path": "local", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
        )

    images = Dataset.from_dict({"id": [f"i{row}" for row in range(ROWS)], "image": photos})
    captions = [(row, text) for row in range(ROWS) for text in captions_of(row)]
    texts = Dataset.from_dict({"id": [f"t{n}" for n in range(len(captions))], "text": [text for _, text in captions]})
    pairs = [(f"t{n}", f"i{row}") for n, (row, _) in enumerate(captions)]

    class Retrieval(AbsTaskRetrieval):
        def load_data(self, **_):
            to_image = self.metadata.category == "t2i"
            right: dict = {}
            for text, image in pairs:
                right.setdefault(text if to_image else image, {})[image if to_image else text] = 1
            queries, corpus = (texts, images) if to_image else (images, texts)
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=right, top_ranked=None)
                }
            }
            self.data_loaded = True

    class TextToImage(Retrieval):
        metadata = about("LocalT2IRetrieval", "Any2AnyRetrieval", "t2i", "hit_rate_at_1")

    class ImageToText(Retrieval):
        metadata = about("LocalI2TRetrieval", "Any2AnyRetrieval", "i2t", "hit_rate_at_1")

    class Classes(AbsTaskZeroShotClassification):
        metadata = about("LocalZeroShot", "ZeroShotClassification", "i2t", "accuracy")

        def load_data(self, **_):
            names = sorted(SHADES)
            paths = [
                (path, names.index(path.parent.name)) for path in sorted((folder / "classes" / "val").glob("*/*.png"))
            ]
            images, labels = zip(*((Image.open(path), label) for path, label in paths), strict=True)
            self.dataset = {"test": Dataset.from_dict({"image": images, "label": labels})}
            self.data_loaded = True

        def get_candidate_labels(self):
            return [f"a {name}" for name in sorted(SHADES)]

    return [TextToImage, ImageToText, Classes], manifests


def ours(run, kind, manifest, folder):
    words = [kind, str(manifest), "--run", str(run), "--device", "cpu", "--quiet", "--features-dir", str(folder)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    (record,) = [each for each in RunScores.read(run).records if each["task"] == kind]
    return {metric["name"]: metric["value"] / 100 for metric in record["metrics"]}


def scores(results, name):
    (found,) = json.loads((results.folder / f"{name}.json").read_bytes())["scores"]["test"]
    return found


@pytest.fixture(scope="module")
def results(model, local_tasks, tmp_path_factory):
    tasks = [task() for task in local_tasks[0]]
    return mteb_model.evaluate(model, tasks, tmp_path_factory.mktemp("results"), progress=False)


def test_hit_rates_are_our_recall(run, results, local_tasks, tmp_path):
    mine = ours(run, "retrieval", local_tasks[1]["photos"], tmp_path)
    assert not results.failures
    for way in ("t2i", "i2t"):
        yours = scores(results, f"Local{way.upper()}Retrieval")
        for k in (1, 5, 10):
            assert mine[f"{way}_r{k}"] == pytest.approx(yours[f"hit_rate_at_{k}"], abs=1e-5)
    assert 0 < mine["t2i_r5"] < 1
    # An image has two captions, of which one can be first: mteb's recall divides by two.
    assert yours["recall_at_1"] == pytest.approx(mine["i2t_r1"] / 2, abs=1e-5)


def test_zero_shot_accuracy_is_our_top_1(run, results, local_tasks, tmp_path):
    mine = ours(run, "classification", local_tasks[1]["classes"], tmp_path)
    yours = scores(results, "LocalZeroShot")
    assert mine["top1"] == pytest.approx(yours["accuracy"], abs=1e-5)
    assert mine["mean_per_class"] == pytest.approx(yours["recall"], abs=1e-5)
    assert 0 < mine["top1"] < 1


def test_results_name_the_run(run, model, results):
    digest = load_run(run).digest
    assert results.folder.name == digest
    about = json.loads((results.folder / "model_meta.json").read_bytes())
    assert (about["name"], about["revision"]) == ("sail-align/photos-glu", digest)
    assert (about["embed_dim"], about["max_tokens"], about["modalities"]) == (16, 64, ["image", "text"])
    assert about["similarity_fn_name"] == "cosine"


def test_inputs_of_each_modality(model):
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(model, EncoderProtocol)
    images = [draw(seed, SHADES["cat"]) for seed in range(3)]
    texts = ["a cat", "the dog", "a bench"]
    image_NE, text_NE = (part.numpy() for part in (model.model.encode_image(images), model.model.encode_text(texts)))
    both = [{"image": images[:2], "text": texts[:2]}, {"image": images[2:], "text": texts[2:]}]
    quiet = {"show_progress_bar": False}
    np.testing.assert_allclose(model.encode(both, **quiet), image_NE + text_NE, atol=1e-5)
    np.testing.assert_allclose(model.encode([{"text": texts}], **quiet), text_NE, atol=1e-5)
    np.testing.assert_allclose(model.encode([{"image": images}], **quiet), image_NE, atol=1e-5)
    with pytest.raises(ValueError, match=r"A batch has audio; expected image or text\."):
        model.encode([{"audio": [1]}], **quiet)
    cosines = image_NE @ text_NE.T
    np.testing.assert_allclose(model.similarity(3 * image_NE, text_NE), cosines, atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(3 * image_NE, text_NE), cosines.diagonal(), atol=1e-6)


def test_command_keeps_scores_and_reports_failed_tasks(run, local_tasks, tmp_path, monkeypatch):
    from mteb.get_tasks import _TASKS_REGISTRY

    good, _, other = local_tasks[0]

    class Unreachable(other):
        metadata = other.metadata.model_copy(update={"name": "LocalUnreachable"})

        def load_data(self, **_):
            raise ConnectionError("no route to the hub")

    monkeypatch.setitem(_TASKS_REGISTRY, "LocalT2IRetrieval", good)
    monkeypatch.setitem(_TASKS_REGISTRY, "LocalUnreachable", Unreachable)
    out = tmp_path / "out"
    words = ["mteb", str(run), "--tasks", "LocalT2IRetrieval,LocalUnreachable", "--out", str(out), "--quiet"]
    result = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert result.exit_code == 1
    assert "error: LocalUnreachable failed: no route to the hub" in result.output
    assert "LocalT2IRetrieval  hit_rate_at_1" in result.output
    assert f"wrote {out / 'results' / 'sail-align__photos-glu'}" in result.output
    (kept,) = out.rglob("LocalT2IRetrieval.json")
    before = kept.stat().st_mtime_ns
    assert CliRunner().invoke(app, [*words[:3], "LocalT2IRetrieval", *words[4:]]).exit_code == 0
    assert kept.stat().st_mtime_ns == before


def test_bad_tasks_get_one_message(run, monkeypatch):
    # building mteb's 150 benchmarks takes seconds
    monkeypatch.setattr("mteb.get_benchmark", {}.__getitem__)
    monkeypatch.setattr("mteb.get_benchmarks", lambda: [SimpleNamespace(name="MIEB(lite)")])
    names = ["--tasks", "CIFAR10ZeroShott,ESC50", "--tasks", "nonsense here", "--benchmark", "MIEB(lit)"]
    problem = CliRunner().invoke(app, ["mteb", str(run), *names]).exception
    assert isinstance(problem, UserError)
    assert str(problem) == (
        "'CIFAR10ZeroShott' is not a task of mteb. Did you mean 'CIFAR10ZeroShot'? "
        "'nonsense here' is not a task of mteb. "
        "'MIEB(lit)' is not a benchmark of mteb. Did you mean 'MIEB(lite)'? "
        "'ESC50' takes audio, expected images or texts. `mteb available-tasks` lists the tasks."
    )


def test_tasks_of_a_benchmark(local_tasks, monkeypatch):
    tasks = [task() for task in local_tasks[0]]
    monkeypatch.setattr("mteb.get_benchmark", {"MIEB(mine)": SimpleNamespace(tasks=tasks)}.__getitem__)
    assert find_tasks([], ["MIEB(mine)"]) == tasks


def test_no_task_no_folder_and_no_mteb(run, monkeypatch):
    not_a_folder = ["--tasks", "CIFAR10ZeroShot", "--out", str(run / "settings.json")]
    problem = CliRunner().invoke(app, ["mteb", str(run), *not_a_folder]).exception
    assert str(problem) == f"--out {run / 'settings.json'} is a file. Name a folder."
    assert str(CliRunner().invoke(app, ["mteb", str(run)]).exception) == (
        "No task is given. Pass --tasks NAME,… or --benchmark NAME."
    )

    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", import_module)
    problem = CliRunner().invoke(app, ["mteb", str(run), "--tasks", "CIFAR10ZeroShot"]).exception
    assert str(problem) == "mteb is not installed. Install it with: pip install 'sail-align[mteb]'."


def test_export_for_sentence_transformers_gives_the_same_numbers(run, results, local_tasks, tmp_path):
    pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")
    import mteb
    from mteb.models import SentenceTransformerEncoderWrapper

    from sail_align.align.cli import app as align_app
    from sail_align.sentence_transformers import load

    words = ["export", str(run), "--to", "sentence-transformers", "--out", str(tmp_path / "st")]
    assert CliRunner().invoke(align_app, words).exit_code == 0
    model = SentenceTransformerEncoderWrapper(load(tmp_path / "st", device="cpu"))
    # mteb takes a model that is not on the hub for one of texts
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": ["image", "text"]})
    tasks = [local_tasks[0][0]()]
    found = mteb.evaluate(model, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    yours, mine = found.task_results[0].scores["test"][0], scores(results, "LocalT2IRetrieval")
    assert {k: yours[f"hit_rate_at_{k}"] for k in (1, 5, 10)} == {k: mine[f"hit_rate_at_{k}"] for k in (1, 5, 10)}
