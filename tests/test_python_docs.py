"""The code of docs/python.md runs as it is written."""

import re
from pathlib import Path

import pytest
from small_world import SHADES, captions_of, draw

import sail_align

DOCUMENT = (Path(__file__).parents[1] / "docs" / "python.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the examples name."""
    for name, rows in (("photos", 60), ("test", 20)):
        (tmp_path / name).mkdir()
        for row in range(rows):
            picture = draw(1_000 * rows + row, list(SHADES.values())[row % 5])
            picture.save(tmp_path / name / f"{row:03d}.jpg")
            (tmp_path / name / f"{row:03d}.txt").write_text(captions_of(row)[0])
    (tmp_path / "test.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", DOCUMENT, re.M | re.S)[1])
    for name in ("cat", "dog"):
        draw(7, SHADES[name]).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_examples_run(folder, capfd):
    found = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.M | re.S)
    assert len(found) > 10
    names = {}
    for number, code in enumerate(found):
        exec(compile(code, f"docs/python.md, block {number + 1}", "exec"), names)
    printed = capfd.readouterr().out
    assert "`lr` is invalid: got 7, expected 1e-09 to 1.\n" in printed
    assert "<store features/photos.zarr of photos: 60 rows, captions: raw>" in printed


def test_table_lists_every_function():
    functions = set(sail_align.__all__) - {"__version__"}
    assert set(re.findall(r"^\| `(\w+)\(", DOCUMENT, re.M)) == functions
