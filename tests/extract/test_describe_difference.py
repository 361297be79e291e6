"""The first difference of a recorded manifest and the present one, as a message names it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sail_align.extract.system.difference import describe_difference

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("recorded", "now", "message"),
    [
        ({"files": "a.csv"}, {"files": "b.csv"}, "files was 'a.csv' and is now 'b.csv'"),
        (
            {"name": "x", "source": {"kind": "table", "files": ["a", "b"]}},
            {"name": "x", "source": {"kind": "table", "files": ["a", "c"]}},
            "source.files[1] was 'b' and is now 'c'",
        ),
        (
            {"task": {"templates": ["a {}"]}},
            {"task": {"templates": ["a {}", "the {}"]}},
            "task.templates[1] was absent and is now 'the {}'",
        ),
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, "a was 1 and is now absent (2 more differ)"),
        ({"images": None}, {"images": []}, "images was None and is now []"),
        ({"offset": 1}, {"offset": True}, "offset was 1 and is now True"),
        ([1], {"a": 1}, "it was [1] and is now {'a': 1}"),
    ],
)
def test_message_names_the_field_and_both_values(recorded, now, message):
    assert describe_difference(recorded, now) == message


def test_long_texts_show_where_they_differ():
    before, after = ("x" * 5_000 + end + "y" * 5_000 for end in ("left", "right"))
    message = describe_difference({"get": before}, {"get": after})
    assert "left" in message
    assert "right" in message
    assert len(message) < 250


@given(VALUES, VALUES)
def test_equal_values_and_only_those_have_no_difference(recorded, now):
    assert describe_difference(recorded, recorded) == ""
    # 1 and True are equal in Python, but not in a manifest
    assert bool(describe_difference(recorded, now)) >= (recorded != now)


@given(VALUES, VALUES)
def test_messages_are_short(recorded, now):
    assert len(describe_difference({"field": recorded}, {"field": now})) < 2_000
