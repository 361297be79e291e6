"""The public API: `import sail_align`."""

import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command

import sail_align


def test_import_is_light():
    check = "import sys, sail_align; dir(sail_align); sys.exit(bool({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_version_is_that_of_the_installed_package():
    assert sail_align.__version__ == version("sail-align")


def test_each_name_is_imported_from_its_stage():
    found = {name: getattr(sail_align, name) for name in dir(sail_align) if name != "__version__"}
    assert {name: value.__name__ for name, value in found.items()} == {name: name for name in found}
    assert {value.__module__.split(".")[1] for value in found.values()} == {"extract", "align", "evaluate"}


def test_help_is_a_guide_with_every_function():
    page = pydoc.render_doc(sail_align, renderer=pydoc.plaintext)
    for name in sail_align.__all__:
        assert re.search(rf"^    (class )?{name}\(|^{name.strip('_').upper()}$", page, re.M), name
    assert "sail_align.fit(" in page.split("FUNCTIONS")[0]


def test_dir_lists_the_public_names():
    assert dir(sail_align) == sorted([*sail_align.__all__, "UserError"])


def test_unknown_attribute_raises_attribute_error():
    with pytest.raises(AttributeError, match="'sail_align' has no attribute 'lod'"):
        _ = sail_align.lod


@pytest.mark.parametrize(
    ("stage", "command", "function", "more"),
    [
        ("extract", "run", "build_store", {"report"}),
        ("extract", "import", "import_features", set()),
        ("align", "fit", "fit", set()),
        ("evaluate", "all", "score", {"sets", "task", "protocol"}),
    ],
)
def test_functions_take_the_options_of_their_commands(stage, command, function, more):
    program = get_command(importlib.import_module(f"sail_align.{stage}.cli").app)
    options = {name.lstrip("-").replace("-", "_") for each in program.commands[command].params for name in each.opts}
    assert set(inspect.signature(getattr(sail_align, function)).parameters) == options - {"json"} | more


@pytest.mark.parametrize("document", ["docs/guarantees.md", "SECURITY.md"])
def test_documents_name_tests_that_exist(document):
    root = Path(__file__).parents[1]
    named = re.findall(
        r"`((?:extract/|align/|evaluate/|faults/|fuzz/)(?:test_\w+\.py)?|test_\w+\.py)`", (root / document).read_text()
    )
    assert len(named) > 10
    assert [name for name in named if not (root / "tests" / name).exists()] == []
