"""sail-extract as typed: a mistake is one sentence and exit code 2, and nothing that is there is lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGED = ["--image-encoder", "efficientnet-lite0", "--text-encoder", "minilm-l6"]


def edit(manifest: Path, old: str, new: str) -> None:
    content = manifest.read_text()
    assert old in content
    manifest.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "arguments", "said"),
    [
        (
            "",
            "",
            ["--image-encoder", "dinov2-larg"],
            "Unknown image encoder 'dinov2-larg'. Did you mean",
        ),
        ("", "", ["--text-encoder", "gte"], "Unknown text encoder 'gte'"),
        ("", "", [*PACKAGED, "--captions", "raw,short"], "pictures has no caption 'short'; it has raw, long."),
        (
            "captions: {raw: caption, long: story}",
            "captions: {raw: caption, long: story}\nencoders: {captions: [raw, short]}",
            PACKAGED,
            "pictures has no caption 'short'; it has raw, long.",
        ),
        ("", "", [*PACKAGED, "--precision", "float8"], "Unknown precision 'float8'"),
        ("raw: caption", "raw: captoin", PACKAGED, "has no column 'captoin'; its columns are"),
        ("images: images", "imagse: images", PACKAGED, "unknown field 'source.table.imagse'"),
        ("", "", [*PACKAGED, "--image-encoder", "hf:/"], "/ has no config.json"),
        ("images: images", "images: empty", PACKAGED, "None of the first 100 images is under"),
    ],
)
def test_a_mistake_is_one_sentence_and_makes_no_store(pictures, typed, old, new, arguments, said):
    (pictures / "empty").mkdir()
    edit(pictures / "pictures.yaml", old, new)
    out = pictures / "out.zarr"
    code, _, err = typed("run", str(pictures / "pictures.yaml"), "--out", str(out), "--quiet", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", ["status", "verify"])
def test_what_is_no_store_is_said(tmp_path, typed, command):
    code, _, err = typed(command, str(tmp_path))
    assert (code, err) == (2, f"error: {tmp_path} is not a feature store; make one with `sail-extract run`.\n")


@pytest.mark.slow
def test_run_status_and_verify(pictures, typed):
    edit(pictures / "pictures.yaml", "{raw: caption, long: story}", "{raw: caption}")
    manifest, out = str(pictures / "pictures.yaml"), pictures / "out.zarr"
    code, printed, _ = typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED)
    assert code == 0
    assert "image/efficientnet-lite0: 3/3 shards, dim 1280: 1 missing, 597 ok, 2 undecodable" in printed
    assert f"Next: sail-extract doctor {out}" in printed  # these pictures are noise, and have nothing of their captions
    assert "3/3 shards" in typed("status", str(out))[1]
    assert typed("verify", str(out))[0] == 0

    shard = out / "text/minilm-l6/raw/features/c/1/0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    code, printed, _ = typed("verify", str(out), "--discard")
    assert code == 1
    assert "text/minilm-l6/raw shard 1: features are not as they were committed" in printed
    assert "256 rows encoded" in typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED)[1]
    assert "no problems found" in typed("verify", str(out))[1]

    code, _, err = typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED, "--text-pooling", "cls")
    assert code == 2
    assert "was made with pooling 'mean', got 'cls'" in err


@pytest.mark.slow
def test_captions_and_encoders_are_added_without_the_images(pictures, typed, monkeypatch):
    manifest, out = str(pictures / "pictures.yaml"), pictures / "out.zarr"
    assert typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED, "--captions", "raw")[0] == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    shutil.move(pictures / "images", pictures / "elsewhere")
    monkeypatch.setattr("sail_align.extract.encoders.load.ImageEncoderConfig.load", None)
    code, printed, _ = typed("run", manifest, "--out", str(out), "--quiet", "--add-captions", "long")
    assert code == 0
    assert "text/minilm-l6/long: 3/3 shards, dim 384: 1 missing, 599 ok" in printed
    assert all(file.read_bytes() == content for file, content in before.items())
    code, _, err = typed("run", manifest, "--out", str(out), "--add-captions", "short")
    assert (code, err) == (2, "error: pictures has no caption 'short'; it has raw, long.\n")

    shutil.move(pictures / "elsewhere", pictures / "images")
    monkeypatch.setattr("sail_align.extract.executor.encode.encode_images", None)
    arguments = ["--image-encoder", "efficientnet-lite0", "--text-encoder", "minilm-l6", "--text-pooling", "mean"]
    code, printed, _ = typed("run", manifest, "--out", str(out), "--quiet", *arguments)
    assert code == 0  # what is done already is neither loaded nor read
    assert "0 rows encoded" in printed


def test_help_answers_without_loading_torch():
    for command in ("extract", "align", "evaluate"):
        code = f"import sys, sail_align.{command}.cli; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
