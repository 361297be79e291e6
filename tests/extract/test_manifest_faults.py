"""Manifests that are damaged, or made to use up time and memory: one clear error at once."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.system.yaml_files import read_yaml

BASE = "name: x\npurpose: train\ntitle: t\nlicence: l\nget: g\n"
SOURCE = "source: {kind: demo, part: train}\n"
MANY = "\n".join(f"- &a{n} [{','.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(9))


def read(folder: Path, text: str) -> Manifest:
    path = folder / "made.yaml"
    path.write_text(text, encoding="utf-8")
    return Manifest.read(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + SOURCE + "title: u\n", "line 7: got the key 'title' twice"),
        (BASE + "source: {kind: demo, part: train, kind: table}\n", "line 6: got the key 'kind' twice"),
        (BASE + "source: {classes: {1: a, '1': b}}", "line 6: got the key '1' twice"),
        (BASE + "source: {classes: {1: a, 0x1: b}}", "line 6: got the key '0x1' twice"),
        (MANY, "line 1: got more than 20 levels or 100,000 values"),
        ("source: &a [*a]", "line 1: got more than 20 levels"),
        ("x: " + "[" * 3_000, "not valid YAML|got more than 20 levels"),
        ("- " * 10_000, "line 1: got more than 20 levels"),
        ("[" + "1," * 500_000 + "]", "got more than 20 levels or 100,000 values"),
        ("x: |\n" + " y\n" * 500_000, "got more than 1,048,576 bytes"),
        (BASE.replace("title: t", "title: 2020-99-99"), "line 3: got '2020-99-99', which is not a valid timestamp"),
        (BASE + "expected_rows: " + "9" * 5_000, r"line 6: got '9{100}', which is not a valid int"),
        (BASE + "expected_rows: !!int ''", "line 6: got '', which is not a valid int"),
        (BASE.replace("title: t", r'title: "\e]0;PWNED\a"'), r"line 3: got control characters in '\\x1b\]0;PWNED"),
        (BASE + f"source: {list(range(50_000))}", "made.yaml: field 'source' is invalid"),
        (BASE + f"source: {{kind: table, captions: {'x' * 9_999}, files: {[1] * 9_999}}}", "field 'source.files"),
        ("[1, 2]", r"got \[1, 2\], expected a mapping of fields"),
        ("", "got None, expected a mapping of fields"),
    ],
    ids=range(18),
)
def test_one_short_error_at_once(tmp_path, text, message):
    started = time.process_time()
    with pytest.raises(UserError, match=message) as problem:
        read(tmp_path, text)
    assert time.process_time() - started < 5
    assert "made.yaml" in str(problem.value)
    assert len(str(problem.value)) < 600
    assert str(problem.value).isprintable()


def table(**fields):
    return BASE + "source: " + json.dumps({"kind": "table", "files": "t.csv", "captions": "c", **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("title: t", "title: 3") + SOURCE, "'title' is invalid: got 3, expected text"),
        (
            BASE.replace("name: x", "name: A B") + SOURCE,
            "'name' is invalid: got 'A B'. Expected lower-case letters, digits",
        ),
        (BASE + "source: [3]", "'source' is invalid: got [3], expected a mapping"),
        (BASE + SOURCE + "encoders: 3", "'encoders' is invalid: got 3, expected a mapping"),
        (BASE + SOURCE + "expected_rows: 0", "'expected_rows' is invalid: got 0, expected a number greater than 0"),
        (BASE + SOURCE + "expected_rows: 1.5", "'expected_rows' is invalid: got 1.5, expected a whole number"),
        (BASE.replace("train", "0x" + "f" * 5_000) + SOURCE, "'purpose' is invalid: got a number of 20,000 bits"),
        (table(files=3), "'source.files' is invalid: got 3, expected text or a list."),
        (table(files=[3]), "'source.files.0' is invalid: got 3, expected text."),
        (table(files=[]), "'source.files' is invalid: got [], expected text or at least one entry."),
        (table(files=""), "'source.files' is invalid: got '', expected at least one character or a list."),
        (table(captions={"raw": 3}), "'source.captions.raw' is invalid: got 3, expected text."),
        (
            table(classes={"x": "a"}),
            "'source.classes' is invalid: got {'x': 'a'}. Got the mask values x, expected 0 to 254.",
        ),
        (table(classes={"300": "a"}), "Got the mask values 300, expected 0 to 254."),
        (table(encoding="x"), "'source.encoding' is invalid: got 'x'. unknown encoding: x."),
    ],
    ids=range(15),
)
def test_faults_are_described_in_the_words_of_manifests(tmp_path, text, message):
    with pytest.raises(UserError) as problem:
        read(tmp_path, text)
    assert message in str(problem.value)
    assert not re.search(r"Input|should|constrained|\[type|pydantic", str(problem.value))


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Manifest.read(tmp_path)
    (tmp_path / "made.yaml").write_bytes(b"title: caf\xe9")
    with pytest.raises(UserError, match="not valid YAML"):
        Manifest.read(tmp_path / "made.yaml")


def test_merged_keys_may_be_replaced(tmp_path):
    (tmp_path / "made.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: [*a], z: *a}\n")
    both = {"x": 1, "y": 2}
    assert read_yaml(tmp_path / "made.yaml") == {"a": both, "b": {"x": 3, "y": 2}, "c": {**both, "z": both}}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES)
def test_plain_values_are_read_as_by_yaml(tmp_path, value):
    path = tmp_path / "made.yaml"
    text = yaml.safe_dump(value, allow_unicode=True)
    path.write_bytes(text.encode())
    try:
        read = read_yaml(path)
    except UserError as problem:
        if "control characters" not in str(problem):
            raise
    else:
        assert read == yaml.safe_load(text)  # which differs from `value` if it has breaks of lines like U+0085


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("{}[]&*a1:!<>|-?'\"\n #,%@\\\t.x"), max_size=40))
def test_any_text_is_read_or_a_user_error(tmp_path, text):
    try:
        read(tmp_path, text)
    except UserError as problem:
        assert "made.yaml" in str(problem)  # noqa: PT017


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..999999999}.tar", "got more than 1,000,000 names"),
        ("{0..999}/{0..9999}.tar", "got more than 1,000,000 names"),
        ("{0.." + "9" * 5_000 + "}.tar", "got more than 1,000,000 names"),
        ("{5..4}.tar", "it ends before it begins"),
    ],
)
def test_ranges_are_bounded(tmp_path, pattern, message):
    with pytest.raises(UserError, match=message) as problem:
        FileSet(tmp_path).find(pattern)
    assert len(str(problem.value)) < 400


@pytest.mark.slow
def test_ranges_count_together(tmp_path):
    with pytest.raises(UserError, match="more than 1,000,000 names"):
        FileSet(tmp_path).find(["memory://nowhere/{000000..900000}.tar", "memory://nowhere/{000000..900000}.tar"])
    assert FileSet(tmp_path).find("memory://nowhere/{08..10}-{1..2}x.tar") == [
        f"memory://nowhere/{first}-{second}x.tar" for first in ("08", "09", "10") for second in (1, 2)
    ]
