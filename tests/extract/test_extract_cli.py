"""The sail-extract commands. A mistake prints one line and exits with code 2, and no existing data are lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGED = ["--image-encoder", "efficientnet-lite0", "--image-size", "64", "--text-encoder", "minilm-l6"]


def edit(manifest: Path, old: str, new: str) -> None:
    content = manifest.read_text()
    assert old in content
    manifest.write_text(content.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "arguments", "message"),
    [
        (
            "",
            "",
            ["--image-encoder", "dinov2-larg"],
            "Unknown image encoder 'dinov2-larg'. Did you mean",
        ),
        ("", "", ["--text-encoder", "gte"], "Unknown text encoder 'gte'"),
        (
            "",
            "",
            [*PACKAGED, "--captions", "raw,short"],
            "pictures has no caption 'short'. Its captions are: raw, long.",
        ),
        (
            "captions: {raw: caption, long: story}",
            "captions: {raw: caption, long: story}\nencoders: {captions: [raw, short]}",
            PACKAGED,
            "pictures has no caption 'short'. Its captions are: raw, long.",
        ),
        ("", "", [*PACKAGED, "--precision", "float8"], "Unknown precision 'float8'"),
        ("raw: caption", "raw: captoin", PACKAGED, "has no column 'captoin'. Its columns are"),
        ("images: images", "imagse: images", PACKAGED, "field 'source.imagse' is unknown"),
        ("", "", [*PACKAGED, "--image-encoder", "hf:/"], "/ has no config.json"),
        ("images: images", "images: empty", PACKAGED, "None of the first 100 images is in"),
    ],
)
def test_mistake_prints_one_line_and_creates_no_store(pictures, typed, old, new, arguments, message):
    (pictures / "empty").mkdir()
    edit(pictures / "pictures.yaml", old, new)
    out = pictures / "out.zarr"
    code, _, err = typed("run", str(pictures / "pictures.yaml"), "--out", str(out), "--quiet", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", ["status", "verify"])
def test_folder_that_is_not_a_store_is_rejected(tmp_path, typed, command):
    code, _, err = typed(command, str(tmp_path))
    assert (code, err) == (2, f"error: {tmp_path} is not a feature store. Make one with `sail-extract run`.\n")


@pytest.mark.slow
def test_run_status_and_verify(pictures, typed):
    edit(pictures / "pictures.yaml", "{raw: caption, long: story}", "{raw: caption}")
    manifest, out = str(pictures / "pictures.yaml"), pictures / "out.zarr"
    code, printed, _ = typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED)
    assert code == 0
    assert "image/efficientnet-lite0: 3/3 shards, dim 1280: 1 missing, 597 ok, 2 undecodable" in printed
    assert f"Next: sail-extract doctor {out}" in printed  # these pictures are noise, unrelated to their captions
    assert "3/3 shards" in typed("status", str(out))[1]
    assert typed("verify", str(out))[0] == 0

    shard = out / "text/minilm-l6/raw/features/c/1/0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    code, printed, _ = typed("verify", str(out), "--discard")
    assert code == 1
    assert "text/minilm-l6/raw shard 1: features file has changed since it was committed" in printed
    assert "256 rows of" in typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED)[1]
    assert "no problems found" in typed("verify", str(out))[1]

    code, _, err = typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED, "--text-pooling", "cls")
    assert code == 2
    assert "was made with pooling 'mean', got 'cls'" in err


@pytest.mark.slow
def test_captions_are_added_without_reading_images(pictures, typed, monkeypatch):
    manifest, out = str(pictures / "pictures.yaml"), pictures / "out.zarr"
    assert typed("run", manifest, "--out", str(out), "--quiet", *PACKAGED, "--captions", "raw")[0] == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    shutil.move(pictures / "images", pictures / "elsewhere")
    monkeypatch.setattr("sail_align.extract.encoders.load.ImageEncoderConfig.load", None)
    code, printed, _ = typed("run", manifest, "--out", str(out), "--quiet", "--add-captions", "long")
    assert code == 0
    assert "text/minilm-l6/long: 3/3 shards, dim 384: 1 missing, 599 ok" in printed
    assert [file for file, content in before.items() if file.read_bytes() != content] == [out / "zarr.json"]
    code, _, err = typed("run", manifest, "--out", str(out), "--add-captions", "short")
    assert (code, err) == (2, "error: pictures has no caption 'short'. Its captions are: raw, long.\n")

    shutil.move(pictures / "elsewhere", pictures / "images")
    monkeypatch.setattr("sail_align.extract.executor.encode.encode_images", None)
    arguments = [*PACKAGED, "--text-pooling", "mean"]
    code, printed, _ = typed("run", manifest, "--out", str(out), "--quiet", *arguments)
    assert code == 0  # finished work is neither loaded nor read
    assert "0 rows encoded" in printed


@pytest.mark.slow
def test_command_lines_load_without_torch():
    for command in ("extract", "align", "evaluate"):
        code = f"import sys, sail_align.{command}.cli; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
