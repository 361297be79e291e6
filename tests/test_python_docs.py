"""The code of docs/python.md and of the package's docstring runs as it is written."""

import re
from pathlib import Path

import pytest
import yaml
from small_world import SHADES, captions_of, draw

import sail_align

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the examples name."""
    for name, rows in (("photos", 60), ("test", 20)):
        (tmp_path / name).mkdir()
        for row in range(rows):
            picture = draw(1_000 * rows + row, list(SHADES.values())[row % 5])
            picture.save(tmp_path / name / f"{row:03d}.jpg")
            (tmp_path / name / f"{row:03d}.txt").write_text(captions_of(row)[0])
        about = {
            "name": name,
            "source": {"kind": "images", "root": name},
            "encoders": {"image": "efficientnet-lite0", "text": "minilm-l6"},
        }
        if name == "test":
            about["task"] = {"kind": "retrieval"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(about))
    for name in ("cat", "dog"):
        draw(7, SHADES[name]).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```", document, re.M | re.S)


@pytest.mark.slow
def test_examples_run(folder, capfd):
    found = blocks((ROOT / "docs" / "python.md").read_text())
    assert len(found) > 10
    names = {}
    for number, code in enumerate(found):
        exec(compile(code, f"docs/python.md, block {number + 1}", "exec"), names)
    printed = capfd.readouterr().out
    assert "`lr` is invalid: got 7, expected 1e-09 to 1.\n" in printed
    assert "<store features/photos.zarr of photos: 60 rows, captions: raw>" in printed


def test_table_lists_every_function():
    document = (ROOT / "docs" / "python.md").read_text()
    functions = set(sail_align.__all__) - {"__version__"}
    assert set(re.findall(r"^\| `(\w+)\(", document, re.M)) == functions
