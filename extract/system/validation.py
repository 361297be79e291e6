"""Checks that the content of a file has its form, with messages in the words of the file's author."""

import re
from dataclasses import dataclass
from functools import cache
from reprlib import Repr
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Form = TypeVar("Form")


class _Repr(Repr):
    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < _MOST_BITS else f"a number of {x.bit_length():,} bits"


_MOST_BITS = 10_000
"""Python refuses to print numbers of more than 4,300 digits."""
_repr = _Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
shortened = _repr.repr
"""Return the representation of a value, without the middle of a long one."""

_WHOLE, _MAPPING = "a whole number", "a mapping"
_EXPECTED = {
    "string_type": "text",
    "list_type": "a list",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": "a smaller number",
}
"""The expected kind of value, by pydantic's type of the error."""
_BRANCH = re.compile(r"str|int|constrained-.*|(list|dict|nullable|function-[a-z]+)\[.*|\[key\]")
"""Parts of the location of an error that name a branch of a type instead of a field."""


@dataclass(frozen=True)
class Problem:
    """The first fault of a value that pydantic rejected.

    Attributes:
        kind: Pydantic's type of the error.
        place: Names and numbers that lead to the faulty value.
        value: The value.
        expected: What it should be. Empty if `message` tells.
        message: Message of our own validators.
        context: Pydantic's details.
    """

    kind: str
    place: tuple[str | int, ...]
    value: Any
    expected: str
    message: str
    context: dict[str, Any]

    @classmethod
    def first(cls, error: ValidationError) -> "Problem":
        """Return the first fault. Of a value that may have one of several types, all are named."""
        errors = error.errors(include_url=False)
        places = [tuple(part for part in each["loc"] if not _BRANCH.fullmatch(str(part))) for each in errors]
        # A misspelt field is both unknown and missing. The unknown one makes the more helpful message.
        first = min(range(len(errors)), key=lambda each: errors[each]["type"] != "extra_forbidden")
        same = [each for each, place in enumerate(places) if place[: len(places[first])] == places[first]]
        if errors[first]["type"] != "extra_forbidden":
            first = max(same, key=lambda each: len(places[each]))  # the branch that fits up to an inner value
        expected = dict.fromkeys(_expected(errors[each]) for each in same if places[each] == places[first])
        problem = errors[first]
        return cls(
            problem["type"],
            places[first],
            problem["input"],
            " or ".join(filter(None, expected)),
            problem["msg"].removeprefix("Value error, ") if problem["type"] == "value_error" else "",
            problem.get("ctx", {}),
        )


def _expected(problem: Any) -> str:
    context = problem.get("ctx", {})
    match kind := problem["type"]:
        case "string_pattern_mismatch" if context["pattern"] == r"\S":
            return "text that is not blank"
        case "string_pattern_mismatch":
            return f"text that matches {context['pattern']}"
        case "string_too_short" | "too_short":
            count = context["min_length"]
            one, more = ("character", "characters") if kind.startswith("string") else ("entry", "entries")
            return f"at least one {one}" if count == 1 else f"at least {count} {more}"
        case "literal_error":
            return str(context["expected"])
        case "value_error":
            return ""
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"a number {problem['msg'].removeprefix('Input should be ')}"
        case "missing":
            return "a value"
        case "extra_forbidden":
            return "no such field"
        case "finite_number":
            return "a finite number"
    return _EXPECTED.get(kind) or re.sub(r"^(Input|String|List|Dictionary) should (be )?", "", problem["msg"])


def validated(form: type[Form], content: Any, place: str = "") -> Form:
    """Return the content of a JSON file as a form, a `TypedDict`, checked. These are several times faster than models.

    Raises:
        ValueError: A value is missing or invalid. The message names its place in the file, and the value.
    """
    key: Any = form
    try:
        checked: Form = _adapter(key).validate_python(content, strict=True)
    except ValidationError as problem:
        first = Problem.first(problem)
        for name in first.place:
            place += f"[{name}]" if isinstance(name, int) else f".{name}" if place else name
        got = "no value" if first.kind == "missing" else shortened(first.value)
        raise ValueError(f"{place or 'the content'}: got {got}, expected {first.expected}") from problem
    return checked


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)
