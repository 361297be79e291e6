"""`build_store` builds the same store as `sail-extract run`, from Python."""

import shutil
from pathlib import Path

import pytest

from sail_align.extract.build import Report, build_store
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, find_manifest


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_python_and_the_command_build_the_same_bytes(pictures, typed, fake_encoders, monkeypatch):
    monkeypatch.chdir(pictures)
    manifest, _ = find_manifest("pictures.yaml")
    assert typed("run", "pictures.yaml", "--captions", "long, raw", "--quiet")[0] == 0
    command = contents(Path("features/pictures.zarr"))
    seen = []
    report = Report(
        *(lambda *got, event=event: seen.append((event, *got)) for event in ("own", "source", "store", "end"))
    )
    built = {
        "path": build_store(pictures / "pictures.yaml", out="a.zarr", captions=["long", "raw"], quiet=True),
        "manifest": build_store(manifest, out="b.zarr", captions="long,raw", workers=1, quiet=True, report=report),
        "other folder": build_store(manifest, out="c.zarr", data_root=pictures, captions=("long", "raw"), quiet=True),
    }
    assert [event for event, *_ in seen] == ["source", "store", "end"]
    _, store, job, (summary,) = seen[-1]
    assert (store, job.manifest, summary.encoded) == (built["manifest"], manifest, 1_800)
    for how, store in built.items():
        assert (store.rows, store.captions) == (600, ("raw", "long"))
        assert store.image().counts == {"ok": 597, "missing": 1, "undecodable": 2}, how
        of_store = contents(store.path)
        for name in set(command) | set(of_store):
            if name != "log.jsonl":
                assert command[name] == of_store[name], f"{how}: {name}"


@pytest.mark.slow
def test_captions_are_added_and_failures_retried(pictures, fake_encoders):
    out = pictures / "s.zarr"
    assert build_store(pictures / "pictures.yaml", out=out, captions="raw", quiet=True).texts("long") == {}
    options = {"out": out, "text_encoder": "minilm-l6", "quiet": True}
    assert build_store(pictures / "pictures.yaml", add_captions=["long"], **options).text("long").complete
    shutil.copy(pictures / "images" / "8.png", pictures / "images" / "7.png")
    store = build_store(pictures / "pictures.yaml", retry="failed", **options)
    assert store.image().counts == {"ok": 598, "undecodable": 2}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("dmo", {}, "Manifest 'dmo' is unknown"),
        ("pictures.yaml", {"captions": ["short"]}, "pictures has no caption 'short'. Its captions are: raw, long."),
        ("pictures.yaml", {"retry": "all"}, "--retry 'all' is invalid: expected failed."),
        ("pictures.yaml", {"retry": "failed", "workers": 2}, "--retry works in one process"),
        ("pictures.yaml", {"engine": "slurm"}, "--engine 'slurm' is invalid"),
        ("pictures.yaml", {"precision": "float8"}, "Unknown precision 'float8'"),
        ("pictures.yaml", {"precision": "tf32", "device": "cpu"}, "tf32 needs an NVIDIA GPU, got device cpu"),
    ],
)
def test_mistakes_are_user_errors_and_create_nothing(pictures, monkeypatch, data, options, message):
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError) as problem:
        build_store(data, **options)
    assert message in str(problem.value)
    assert not Path("features").exists()


def test_manifest_object_takes_the_current_folder_as_data_root(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    content = find_manifest("pictures.yaml")[0].model_dump(exclude_none=True)
    content["source"]["images"] = "pictures-of-another-folder"
    with pytest.raises(UserError, match="Image folder pictures-of-another-folder is missing"):
        build_store(Manifest.model_validate(content))


def test_image_size_is_that_of_the_manifest_or_the_option(pictures, monkeypatch):
    class Prepared(Exception):  # noqa: N818
        pass

    def stop(job, *_arguments, **_options):
        raise Prepared(job.image.image_size)

    monkeypatch.chdir(pictures)
    monkeypatch.setattr("sail_align.extract.executor.run.run_job", stop)
    content = find_manifest("pictures.yaml")[0].model_dump(exclude_none=True)
    content["encoders"] |= {"image": "efficientnet-lite0", "image_size": 320, "text": "minilm-l6"}
    manifest = Manifest.model_validate(content)
    for options, size in (({}, 320), ({"image_size": 256}, 256), ({"image_encoder": "efficientnet-lite2"}, None)):
        with pytest.raises(Prepared) as prepared:
            build_store(manifest, captions="raw", quiet=True, **options)
        assert prepared.value.args == (size,)
