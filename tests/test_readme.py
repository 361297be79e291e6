"""Every command of the README, with the built wheel in place of `pip install`, outside the checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sail_align.extract.sources.demo.source import DemoSource

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the README's inputs, and the wheel installed in site/."""
    folder = tmp_path_factory.mktemp("readme")
    build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile"]
    subprocess.run([*build, "--target", folder / "site", "."], cwd=ROOT, check=True, capture_output=True)
    source = DemoSource("train")
    (folder / "photos").mkdir()
    for number, sample in zip(range(60), source.samples(), strict=False):
        source.image(sample.image).save(folder / "photos" / f"{number}.jpg")
        (folder / "photos" / f"{number}.txt").write_text(sample.captions["raw"])
    for animal in ("cat", "dog"):
        source.image("0").save(folder / f"{animal}.jpg")
    return folder


def run(folder: Path, words: list[str]) -> str:
    path = f"{folder / 'site' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "PATH": path}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_readme_works_as_typed(folder):
    where = "import sail_align.extract.cli as cli; print(cli.__file__)"
    assert str(folder) in run(folder, [sys.executable, "-c", where])
    typed = [line for line in SHELL if line.startswith("sail-")]
    assert [line.split()[1] for line in typed] == ["run", "fit", "search", "export"]
    for line in typed:
        run(folder, ["sh", "-c", line])
    for block in PYTHON:
        shown = run(folder, [sys.executable, "-c", block.replace("runs/demo-linear", "runs/photos-linear")])
        assert shown.count(".") == 4  # a similarity for each picture and text


def test_other_commands_of_the_readme_exist():
    makes, others = [], []
    for line in SHELL:
        words = line.split()
        if line and not line.startswith("sail-"):
            (makes if words[0] == "make" else others).append(line)
    assert others == ["pip install 'sail-align[demo]'", "git clone … && cd sail-align"]
    assert makes == ["make demo", "make test"]
    for line in [*makes, *re.findall(r"`(make [^`…]*)`", README)]:
        subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    assert not README.count("\n") > 120


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_links_of_the_readme_lead_to_files_and_headings(link):
    name, _, anchor = link.partition("#")
    assert (ROOT / name).exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
