"""A small data set of pictures on disk, with the defects of real ones."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeChoice
from PIL import Image

from sail_align.extract.cli import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 600 pictures and a table of their captions: 7 is missing, 11 is truncated, 13 is text."""
    root = tmp_path / "pictures"
    (root / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    with (root / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "story", "part"])
        for i in range(600):
            path = root / "images" / f"{i}.png"
            table.writerow([path.name, f"picture {i}", "" if i == 5 else f"A long, long story of number {i}", i % 2])
            if i == 13:
                path.write_text("no picture")
            elif i != 7:
                Image.fromarray(noise.integers(0, 255, (9, 11, 3), dtype=np.uint8)).save(path)
            if i == 11:
                path.write_bytes(path.read_bytes()[:200])
    (root / "pictures.yaml").write_text(MANIFEST)
    return root


@pytest.fixture
def typed(monkeypatch, capsys):
    """A function that runs a command in this process and returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sail-extract", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def fake_encoders(monkeypatch):
    """Every encoder that a command loads is a fake one, which takes milliseconds."""
    import sail_align.extract.executor.job  # noqa: F401 (its annotations need the real classes)

    monkeypatch.setattr(FakeChoice, "download", lambda choice: None, raising=False)
    for name, made in (("ImageEncoderConfig", FakeChoice("image")), ("TextEncoderConfig", FakeChoice("text"))):
        monkeypatch.setattr(f"sail_align.extract.encoders.load.{name}", lambda *names, made=made, **options: made)


MANIFEST = """
name: pictures
purpose: train
title: Noise, and words about it
licence: none
get: made by a test
source:
  kind: table
  files: captions.csv
  images: images
  captions: {raw: caption, long: story}
"""
