"""A store of which a file is gone, cut or something else: every command says so in a sentence that names it."""

import json

import pytest
from typer.testing import CliRunner

from sail_align.align.cli import app as align
from sail_align.extract.cli import app as extract
from sail_align.extract.errors import UserError

pytestmark = pytest.mark.slow

QUICK = ["--quiet", "--steps", 2, "--dim", 8, "--device", "cpu"]

FILES = [
    "zarr.json",
    "index/part-00000.parquet",
    "image/fake-image/zarr.json",
    "image/fake-image/features/zarr.json",
    "image/fake-image/status/zarr.json",
    "image/fake-image/features/c/0/0",
    "image/fake-image/status/c/0",
    "commits/image/fake-image/00000.json",
]


def reshape(file):
    """Turn the tables in a JSON file into lists: what it says is JSON still, and of another form."""
    tables = json.loads(file.read_bytes()) if file.suffix == ".json" else {}
    file.write_text(json.dumps({name: [1] if isinstance(value, dict) else value for name, value in tables.items()}))


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


def make_unreadable(file):
    """As a permission that lacks would, which does not stop root."""
    file.unlink()
    file.symlink_to(file.name)


BREAK = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("what somebody wrote by mistake"),
    "list": lambda file: file.write_text("[1]"),
    "another form": reshape,
    "folder": replace_by_folder,
    "unreadable": make_unreadable,
}


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for i, name in enumerate(FILES) for j, how in enumerate(BREAK) if (i + j) % 2 == 0]
)
def test_no_command_ends_in_a_traceback(make_store, tmp_path, name, how):
    path = make_store(shard_rows=256)
    BREAK[how](path / name)
    said = {}
    for app, words in [
        (align, ["fit", "--features", path, "--out", tmp_path / "run", "--head", "linear", *QUICK]),
        (align, ["measure", path]),
        (align, ["probe", "--features", path, "--out", tmp_path / "probe", *QUICK]),
        (extract, ["status", path]),
        (extract, ["status", path, "--failed"]),
        (extract, ["doctor", path]),
        (extract, ["verify", path]),
    ]:
        done = CliRunner().invoke(app, [*map(str, words)])
        if isinstance(done.exception, UserError):
            said[words[0]] = str(done.exception)
            assert "\n" not in str(done.exception)
        else:
            assert done.exception is None or isinstance(done.exception, SystemExit), (words, repr(done.exception))
    assert str(path) in said["fit"]
    if name.startswith("index"):
        assert said["fit"].startswith(f"{path / name} ")
