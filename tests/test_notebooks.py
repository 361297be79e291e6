"""The notebooks run from start to end, without a network, in an empty folder."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
EXPECTED = {
    "own_photos": r"(\d+)% of the colours are right; chance is 20%",
    "features_you_already_have": r"R@1 (\d+\.\d) %, chance 1\.00 %",
    "compare_encoders": r"efficientnet-lite2: text→image R@1 (\d+\.\d)",
}
"""Text of one result of each notebook, with its number. All are far above chance."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all notebooks, as a user has."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "own_photos" else pytest.param(name, marks=pytest.mark.thorough) for name in EXPECTED]
)
def test_notebook_runs(name, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": folder}}).execute()
    texts = [
        "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    found = re.search(EXPECTED[name], "\n".join(texts))
    assert found, texts
    assert float(found[1]) > 25, texts


def test_every_notebook_is_run_and_has_no_outputs():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(EXPECTED)
    for path in FOLDER.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
        assert cells[0].source.endswith("# %pip install -q 'sail-align[demo]'")
