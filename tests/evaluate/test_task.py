"""Tasks are declared in one file each, and manifests are checked against the declarations."""

import json
import subprocess
import sys

import pytest

from sail_align.evaluate.tasks.task import all_tasks, find_task
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest, packaged_manifests


def manifest(tmp_path, task):
    path = tmp_path / "pictures.yaml"
    content = {"name": "pictures", "purpose": "evaluate", "title": "P", "licence": "none", "get": "draw them"}
    source = {"kind": "class-folder"}
    path.write_text(json.dumps({**content, "source": source, "task": task}))
    return find_manifest(str(path))[0]


@pytest.mark.parametrize("name", packaged_manifests())
def test_packaged_manifests_fit_their_tasks(name):
    about, _ = find_manifest(name)
    if about.task:
        find_task(about.task.kind).check_manifest(about)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "classification", "prompt": "a {}"}, "Field 'task.prompt' of pictures is invalid: classification ig"),
        ({"kind": "retrieval", "templates": ["a {}"]}, "Field 'task.templates' of pictures is invalid: retrieval ig"),
        ({"kind": "retrieval", "variants": ["maskclip"]}, "got 'maskclip', expected hub-corrected"),
        ({"kind": "segmentation", "variants": ["mask-clip"]}, "got 'mask-clip', expected whole-image or maskclip or"),
        ({"kind": "classification", "background": 0.5}, "Field 'task.background' of pictures is invalid"),
    ],
)
def test_fields_that_a_task_ignores_are_rejected(tmp_path, task, message):
    with pytest.raises(UserError, match=message):
        find_task(task["kind"]).check_manifest(manifest(tmp_path, task))


def test_an_unknown_kind_is_rejected_with_the_nearest_one():
    with pytest.raises(UserError, match=r"kind 'segmentaton' is invalid: expected .*Did you mean 'segmentation'\?"):
        find_task("segmentaton")


def test_a_new_file_adds_a_task(tmp_path):
    """A copy of the package with one more module has one more command, and still loads without torch."""
    code = f"""
import sys
import sail_align.evaluate.tasks as tasks
from sail_align.evaluate.tasks import task
real = task.pkgutil.iter_modules
task.pkgutil.iter_modules = lambda paths: [*real(paths), *real([{str(tmp_path)!r}])]
tasks.__path__.append({str(tmp_path)!r})
from sail_align.evaluate import cli
assert "counting" in {{command.name for command in cli.app.registered_commands}}
assert "torch" not in sys.modules
"""
    (tmp_path / "counting.py").write_text(
        "from dataclasses import replace\n"
        "from sail_align.evaluate.tasks import retrieval\n"
        'TASK = replace(retrieval.TASK, kind="counting")\n'
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_headlines_are_metrics_that_exist(scored):
    scores = json.loads((scored / "scores.json").read_bytes())
    for record in scores["records"]:
        assert set(all_tasks()[record["task"]].headlines) <= {metric["name"] for metric in record["metrics"]}
