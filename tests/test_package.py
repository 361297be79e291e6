"""The public API: `import sail_align`."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import sail_align


def test_import_is_light():
    check = "import sys, sail_align; dir(sail_align); sys.exit(bool({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_version_is_that_of_the_installed_package():
    assert sail_align.__version__ == version("sail-align")


def test_load_and_open_store_are_the_functions_of_the_stages():
    from sail_align.align.pretrained import load
    from sail_align.extract.store import Store

    assert sail_align.load is load
    assert sail_align.open_store.__func__ is Store.open.__func__


def test_dir_lists_the_public_names():
    assert dir(sail_align) == ["__version__", "load", "open_store"]


def test_unknown_attribute_raises_attribute_error():
    with pytest.raises(AttributeError, match="'sail_align' has no attribute 'lod'"):
        _ = sail_align.lod


@pytest.mark.parametrize("document", ["docs/guarantees.md", "SECURITY.md"])
def test_documents_name_tests_that_exist(document):
    root = Path(__file__).parents[1]
    named = re.findall(
        r"`((?:extract/|align/|evaluate/|faults/|fuzz/)(?:test_\w+\.py)?|test_\w+\.py)`", (root / document).read_text()
    )
    assert len(named) > 10
    assert [name for name in named if not (root / "tests" / name).exists()] == []
