"""`sail-eval trace`: each link of the chain from scores to data, when it holds, is changed, or is not here."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_world import save_run
from typer.testing import CliRunner

from sail_align.align.cli import app as align
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder, record_digest
from sail_align.evaluate.cli import app
from sail_align.evaluate.results.scores import Record
from sail_align.evaluate.trace import Link, State, _evaluation_data, _training
from sail_align.evaluate.trace import trace as links
from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store.open_or_create import open_or_create


@pytest.fixture
def chain(world, monkeypatch):
    """A run that was trained on a store of squares and scored on other squares; return its folder."""
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr("os.fsync", lambda _: None)
    path = world.squares("photos", [("red", "red"), ("green", "green"), ("blue", "blue")], {"kind": "retrieval"})
    content = yaml.safe_load(path.read_text())
    del content["task"]
    path.write_text(yaml.safe_dump(content | {"purpose": "train"}))
    about, root = find_manifest(str(path))
    store = open_or_create(Path("features/photos.zarr"), about, about.open_source(root), quiet=True)
    for array in (store.add(world.run.image), store.add(world.run.text, "raw")):
        features = np.random.default_rng(0).normal(size=(store.rows, array.dim)).astype(np.float16)
        array.write(0, features, np.full(store.rows, Status.OK, np.uint8))
    run = save_run(Path("runs/glu"), world.run.image, world.run.text)
    used = store.digest_of([store.image(), store.text("raw")])
    data = {"stores": ["features/photos.zarr"], "store_digests": [store.digest], "features_digests": [used]}
    data |= {"image_encoder": world.run.image.spec.fingerprint, "text_encoder": world.run.text.spec.fingerprint}
    settings = json.loads((run / "settings.json").read_bytes()) | data
    (run / "settings.json").write_text(json.dumps(settings))
    saved = Checkpoint.read(run)
    about = {name: saved.record[name] for name in ("architecture", "image", "text")} | {"settings": settings}
    model = saved.load(run, "").model
    Checkpoint.write(saved.folder, model.state_dict(), about, step=9)
    (run / "metrics.jsonl").write_text("")
    RunFolder(run).finish(9)
    world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"})
    world.halves("halves", [("red", "green")], {"kind": "segmentation"})
    for task, name in (("classification", "squares"), ("segmentation", "halves")):
        typed(task, f"{name}/manifest.yaml", "--run", run, "--device", "cpu", "--quiet")
    return run


MANIFESTS = [word for name in ("photos", "squares", "halves") for word in ("--manifest", f"{name}/manifest.yaml")]


def typed(*words, program=app):
    result = CliRunner().invoke(program, [*map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def trace(run, *words):
    """Return the exit code, and the lines by state."""
    result = CliRunner().invoke(app, ["trace", str(run), *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = result.output.splitlines()
    return (
        result.exit_code,
        {state: [line[11:] for line in lines if line.startswith(f"{state:<9}  ")] for state in State},
        lines[-1],
    )


def flip(path):
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def test_states_of_a_link():
    assert Link.of("x", "a" * 64, "a" * 64).state is State.OK
    assert Link.of("x", "a" * 64, "b" * 64).detail == f"recorded {'a' * 12}, now {'b' * 12}"
    assert Link.of("x", "a" * 64, None).state is State.ABSENT
    assert Link.of("x", None, "b" * 64).state is State.UNKNOWN


@pytest.mark.slow
def test_whole_chain_holds(chain):
    code, states, last = trace(chain, *MANIFESTS)
    assert code == 0
    assert not states[State.CHANGED]
    assert not states[State.ABSENT]
    assert not states[State.UNKNOWN]
    assert last == f"The chain holds: {len(states[State.OK])} of {len(states[State.OK])} links are as recorded."
    names = [line.partition(":")[0] for line in states[State.OK]]
    for name in ("runs/glu/scores.json", "checkpoint runs/glu/checkpoints/step-00000009", "runs/glu/settings.json"):
        assert name in names
    for name in ("training store features/photos.zarr", "index of features/photos.zarr", "manifest photos"):
        assert name in names
    assert "files of photos" in names
    for name in ("outcomes", "examples", "data"):
        assert f"{name} of squares (classification)" in names
        assert f"{name} of halves (segmentation)" in names


@pytest.mark.slow
def test_user_manifests_that_are_not_named_are_not_here(chain):
    code, states, last = trace(chain)
    assert code == 0
    assert [line.partition(":")[0] for line in states[State.ABSENT]] == [
        "manifest photos",
        "data of squares (classification)",
        "data of halves (segmentation)",
    ]
    assert last.endswith("links are as recorded (3 not here).")


def _edit(path, change):
    content = yaml.safe_load(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))  # which is also YAML


def _append(path, text):
    Path(path).write_text(Path(path).read_text() + text)


def _only(pattern):
    (found,) = Path().glob(pattern)
    return found


CHANGES = {
    "scores": (lambda run: flip(run / "scores.json"), "runs/glu/scores.json"),
    "outcomes": (lambda run: flip(_only("runs/glu/outcomes/squares-*")), "outcomes of squares (classification)"),
    "examples": (lambda run: flip(_only("runs/glu/examples/halves-*")), "examples of halves (segmentation)"),
    "record": (lambda run: flip(run / "checkpoints/step-00000009/model.json"), "checkpoint"),
    "weights": (
        lambda run: flip(run / "checkpoints/step-00000009/model.safetensors"),
        "weights runs/glu/checkpoints/step-00000009/model.safetensors",
    ),
    "lost record": (lambda run: os.remove(run / "checkpoints/step-00000009/model.json"), "checkpoint"),
    "log": (lambda run: (run / "metrics.jsonl").write_text("x"), "runs/glu/metrics.jsonl"),
    "settings": (
        lambda run: _edit(run / "settings.json", lambda settings: settings.update(lr=1)),
        "runs/glu/settings.json",
    ),
    "damaged settings": (lambda run: (run / "settings.json").write_text("{"), "runs/glu/settings.json"),
    "training marker": (
        lambda run: flip("features/photos.zarr/commits/image/colour-image/00000.json"),
        "training store features/photos.zarr",
    ),
    "training index": (
        lambda run: flip("features/photos.zarr/index/part-00000.parquet"),
        "index of features/photos.zarr",
    ),
    "training manifest": (
        lambda run: _edit("photos/manifest.yaml", lambda content: content["source"].update(image="other")),
        "manifest photos",
    ),
    "training table": (lambda run: _append("photos/captions.csv", "x.png,x\n"), "files of photos"),
    "evaluation features": (
        lambda run: flip(_only("features/eval/squares-*.zarr/image/*/features/c/0/0")),
        "images of squares (classification), features/eval/squares-",
    ),
    "evaluation index": (
        lambda run: flip(_only("features/eval/squares-*.zarr/index/*.parquet")),
        "images of squares (classification), features/eval/squares-",
    ),
    "evaluation images": (
        lambda run: shutil.copy(_only("squares/red/*"), "squares/red/new.png"),
        "data of squares (classification)",
    ),
    "mask": (lambda run: shutil.copy("halves/images/000.png", "halves/masks/000.png"), "data of halves (segmentation)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_each_changed_link_is_named(chain, name):
    change, expected = CHANGES[name]
    change(chain)
    code, states, last = trace(chain, *MANIFESTS)
    assert code == 1
    assert [line for line in states[State.CHANGED] if line.startswith(expected)], states
    assert last.startswith("The chain is broken: ")
    assert any("training store features/photos.zarr" in line for lines in states.values() for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("features/photos.zarr", "training store features/photos.zarr"),
        ("features/eval", "images of squares (classification)"),
        ("squares/red", "data of squares (classification)"),
        ("photos/captions.csv", "files of photos"),
        ("runs/glu/outcomes", "outcomes of squares (classification)"),
        ("runs/glu/checkpoints/step-00000009/model.safetensors", "weights runs/glu"),
    ],
)
def test_removed_links_are_not_here(chain, gone, expected):
    path = Path(gone)
    if gone == "squares/red":
        path = Path("squares")
        shutil.copy("squares/manifest.yaml", "moved.yaml")
    (shutil.rmtree if path.is_dir() else os.remove)(path)
    words = [
        word.replace("squares/manifest.yaml", "moved.yaml") if path.name == "squares" else word for word in MANIFESTS
    ]
    root = ["--data-root", "nowhere"] if path.name == "squares" else []
    code, states, _ = trace(chain, *words, *root)
    assert code == 0
    assert [line for line in states[State.ABSENT] if line.startswith(expected)], states


@pytest.mark.slow
def test_every_flipped_file_of_the_run_and_its_scores_is_noticed(chain):
    ignored = {"report.html"}
    files = [file for file in sorted(chain.rglob("*")) if file.is_file() and file.name not in ignored]
    assert len(files) > 8
    for file in files:
        whole = file.read_bytes()
        flip(file) if whole else file.write_bytes(b"x")
        try:
            code, states, _ = trace(chain, *MANIFESTS)
            assert code == 1, (file, states)
        except UserError:  # finished.json, without which the run has no state
            assert file.name == "finished.json"
        finally:
            file.write_bytes(whole)


@pytest.mark.slow
def test_other_arrays_in_the_training_store_are_no_change(chain, world):
    from sail_align.extract.store.store import Store

    store = Store.open("features/photos.zarr")
    other = replace(world.run.image, spec=replace(world.run.image.spec, id="other", weights="1"))
    array = store.add(other)
    array.write(0, np.zeros((3, 3), np.float16), np.zeros(3, np.uint8))
    code, states, _ = trace(chain, *MANIFESTS)
    assert code == 0
    assert any("to which others were added" in line for line in states[State.OK])


@pytest.mark.slow
def test_chain_of_a_checkpoint_outlives_the_checkpoint(chain):
    record = json.loads((chain / "checkpoints/step-00000009/model.json").read_bytes())
    about = {name: record[name] for name in ("architecture", "image", "text", "settings")}
    best = RunFolder(chain).checkpoint(4, "best")
    Checkpoint.write(best, Checkpoint.read(chain).load(chain, "").model.state_dict(), about, step=4, finished=False)
    typed("classification", "squares/manifest.yaml", "--run", best, "--device", "cpu", "--quiet")
    code, states, _ = trace(best, *MANIFESTS)
    assert (code, states[State.ABSENT]) == (0, [])
    assert any(line.startswith("weights runs/glu/checkpoints/best-00000004") for line in states[State.OK])
    shutil.rmtree(best)
    code, states, _ = trace(best, *MANIFESTS)
    assert code == 0
    assert [line.partition(":")[0] for line in states[State.ABSENT]] == [f"checkpoint {best}"]
    assert any(line.startswith("training store features/photos.zarr") for line in states[State.OK])
    flip(chain / "scores" / best.name / "checkpoint.json")
    assert trace(best)[0] == 1


@pytest.mark.slow
def test_chain_of_an_export(chain):
    typed("export", chain, "--out", "hub", program=align)
    typed("classification", "squares/manifest.yaml", "--run", "hub", "--device", "cpu", "--quiet")
    code, states, _ = trace("hub", *MANIFESTS)
    assert code == 0
    assert [line.partition(":")[0] for line in states[State.ABSENT]] == ["training store 1"]
    config = Path("hub/config.json").read_text()
    for file, change in (
        ("model.safetensors", flip),
        ("config.json", lambda path: path.write_text(config.replace('"step": 9', '"step": 8'))),
    ):
        whole = Path("hub", file).read_bytes()
        change(Path("hub", file))
        code, states, _ = trace("hub", *MANIFESTS)
        assert code == 1
        assert any(f"hub/{file}" in line for line in states[State.CHANGED])
        Path("hub", file).write_bytes(whole)


@pytest.mark.slow
def test_scores_of_a_checkpoint_that_training_has_replaced(chain):
    scores = json.loads((chain / "scores.json").read_bytes())
    del scores["digest"]
    for unfinished, state in (("unfinished: step 3 of 9", State.ABSENT), ("", State.CHANGED)):
        scores["run"] |= {"digest": "e" * 64, "unfinished": unfinished}
        (chain / "scores.json").write_text(json.dumps(scores))
        _, states, _ = trace(chain)
        assert any("checkpoint" in line.partition(":")[0] for line in states[state])


@pytest.mark.parametrize("words", [["trace"], ["report"], ["compare", "elsewhere"]])
def test_path_without_scores_is_one_message(tmp_path, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "run" / "settings.json").write_text("{}")
    messages = {
        tmp_path / "run": r"has no scores\.json\. Run `sail-eval all --run .*` first",
        tmp_path / "run" / "checkpoints" / "best-00000004": r"has no scores\.json\. Run `sail-eval all --run .*` first",
        tmp_path / "no": r"no does not exist\. Name a run",
        tmp_path / "file": r"file is not a run, a checkpoint or an exported folder\. Name a run",
        tmp_path: r"is not a run, a checkpoint or an exported folder\. Name a run",
    }
    for path, message in messages.items():
        result = CliRunner().invoke(app, [words[0], str(path), *words[1:]])
        assert isinstance(result.exception, UserError)
        assert re.search(message, str(result.exception))


def test_nothing_at_a_url_is_opened(world, monkeypatch):
    def fetch(url):
        raise AssertionError(f"fetched {url}")

    monkeypatch.setattr("fsspec.core.url_to_fs", fetch)
    settings = {"stores": ["s3://bucket/photos.zarr"], "store_digests": ["a" * 64], "features_digests": ["b" * 64]}
    (store,) = _training(settings, {})
    assert store.state is State.ABSENT
    assert store.detail.endswith("at a URL, which is not opened")
    about = {"kind": "webdataset", "files": "memory://bucket/{0..9}.tar", "classes": ["a"]}
    (world.folder / "tars").mkdir()
    named = {"tars": find_manifest(str(world.manifest("tars", about, {"kind": "classification"})))}
    data = _evaluation_data(Record(dataset="tars", task="classification", data={"digest": "a" * 64}), named)
    assert data.state is State.ABSENT
    assert data.detail.endswith("at memory://bucket/{0..9}.tar, which is not opened")


def _places(value, path=()):
    """Yield the path of each value in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(inner, (*path, key))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(("first", "odd"), [*enumerate([None, [], {}, "x", -7])])
def test_odd_values_in_any_record_are_no_traceback(chain, first, odd):
    """Also if the digests were computed again."""
    files = [chain / "scores.json", chain / "checkpoints/step-00000009/model.json", chain / "settings.json"]
    for file in files:
        whole = file.read_text()
        skipped = ("metrics", "details", "versions", "golden", "weights")
        places = [place for place in _places(json.loads(whole)) if not any(name in place for name in skipped)]
        for place in places[first::10]:
            content = json.loads(whole)
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            if file.name == "model.json":
                content["digest"] = record_digest(content)
            else:
                content.pop("digest", None)
            file.write_text(json.dumps(content))
            try:
                for _ in links(chain, {}):
                    pass
            except UserError:
                assert file.name == "scores.json"
            except Exception as problem:
                raise AssertionError(f"{file.name} {place}") from problem
        file.write_text(whole)
