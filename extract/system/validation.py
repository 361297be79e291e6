"""Checks that the content of a file has its form, with messages in the words of the file's author."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from reprlib import Repr
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from sail_align.extract.errors import did_you_mean, nearest

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


Models = Sequence[type[BaseModel]]
MOST_MISTAKES = 20
"""Mistakes that a message lists."""


@dataclass(frozen=True)
class Problem:
    """A fault of a value that pydantic rejected.

    Attributes:
        kind: Pydantic's type of the error.
        place: Names and numbers that lead to the faulty value.
        value: The value.
        expected: What it should be. Empty if `message` tells.
        message: Message of our own validators.
        context: Pydantic's details.
        fields: Names of the fields that the model has there, if it is known.
        homes: Names of those of these fields that have a field of this name.
    """

    kind: str
    place: tuple[str | int, ...]
    value: Any
    expected: str
    message: str
    context: dict[str, Any]
    fields: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()

    @classmethod
    def first(cls, error: ValidationError) -> "Problem":
        """Return the first fault. Of a value that may have one of several types, all are named."""
        return cls.all(error)[0]

    @classmethod
    def all(cls, error: ValidationError, model: type[BaseModel] | None = None) -> "list[Problem]":
        """Return all faults, unknown fields first. `model` is the model that the error is of, if it is of one."""
        errors = error.errors(include_url=False)
        found = [_locate(each["loc"], [model] if model else []) for each in errors]
        # Of a value that may have one of several types, keep the type that fits up to an inner value.
        outer = {place[:length] for place, _ in found for length in range(len(place))}
        at_place: dict[tuple[str | int, ...], list[int]] = {}
        for number, (place, _) in enumerate(found):
            if place not in outer:
                at_place.setdefault(place, []).append(number)
        problems = []
        for place, same in at_place.items():
            problem, expected = errors[same[0]], dict.fromkeys(_expected(errors[number]) for number in same)
            fields = {name: field for above in found[same[0]][1] for name, field in above.model_fields.items()}
            inner = {name: _models_in(field.annotation) for name, field in fields.items()}
            problems.append(
                cls(
                    problem["type"],
                    place,
                    problem["input"],
                    " or ".join(filter(None, expected)),
                    problem["msg"].removeprefix("Value error, ") if problem["type"] == "value_error" else "",
                    problem.get("ctx", {}),
                    tuple(fields),
                    tuple(
                        name for name in inner if place and any(place[-1] in each.model_fields for each in inner[name])
                    ),
                )
            )
        return sorted(problems, key=lambda each: each.kind != "extra_forbidden")


def _locate(parts: Sequence[str | int], models: Models) -> tuple[tuple[str | int, ...], Models]:
    """Return the place of an error without the names of types, and the models that may be above it."""
    place: list[str | int] = []
    above, tagged = models, False
    for part in parts:
        if tagged:  # the name of one of several models
            models = [each for each in models if part in get_args(each.model_fields["kind"].annotation)]
            tagged = False
        elif not _BRANCH.fullmatch(str(part)):
            place.append(part)
            above, fields = models, [each.model_fields[part] for each in models if part in each.model_fields]
            models = [inner for field in fields for inner in _models_in(field.annotation)]
            tagged = any(field.discriminator for field in fields)
    return tuple(place), above


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def describe_mistakes(error: ValidationError, model: type[BaseModel], content: Any) -> list[str]:
    """Describe all mistakes in a file of fields, a line each. For an unknown name, suggest the nearest valid one.

    Args:
        error: The error of the model.
        model: The model.
        content: What the model has rejected.
    """
    problems = Problem.all(error, model)
    meant = {}
    for problem in problems:
        if problem.kind == "extra_forbidden" and (near := nearest(str(problem.place[-1]), problem.fields)):
            meant[problem.place] = (*problem.place[:-1], near)
    lines: dict[tuple[object, ...], list[str]] = {}
    for problem in problems:
        if problem.kind == "missing" and problem.place in meant.values():
            continue  # the message about the misspelt field is the more helpful one
        entries = ("each" if isinstance(part, int) else part for part in problem.place)
        line = _describe(problem, meant.get(problem.place), content)
        lines.setdefault((*entries, problem.kind), []).append(line)
    return [line + (f" So are {len(others):,} more entries." if others else "") for line, *others in lines.values()]


def _describe(problem: Problem, meant: tuple[str | int, ...] | None, content: Any) -> str:
    field, value = ".".join(map(str, problem.place)), problem.value
    if problem.kind == "extra_forbidden":
        if problem.homes:
            remedy = f"It belongs under {' or '.join(map(repr, problem.homes))}."
        elif meant is None:
            remedy = "Remove or correct it."
        elif _is_given(content, meant):
            remedy = f"{meant[-1]!r} is given too. Keep one of them."
        else:
            remedy = f"Did you mean {meant[-1]!r}?"
        return f"field {field!r} is unknown: got value {shortened(value)}. {remedy}"
    if problem.kind == "missing":
        return f"field {field!r} is missing. Add it."
    if problem.kind == "union_tag_not_found":
        return f"field '{field}.kind' is missing. Add it."
    if problem.kind in ("union_tag_invalid", "literal_error"):
        expected = problem.expected
        if problem.kind == "union_tag_invalid":
            field, value, expected = f"{field}.kind", problem.context["tag"], problem.context["expected_tags"]
        names = re.findall("'(.+?)'", expected) or [expected]
        guess = did_you_mean(str(value), names) if isinstance(value, str) else ""
        return f"field {field!r} is invalid: got {shortened(value)}, expected {', '.join(names)}.{guess}"
    if problem.message:
        return (
            f"field {field!r} is invalid: got {shortened(value)}. {problem.message}."
            if field
            else f"{problem.message}."
        )
    return f"field {field!r} is invalid: got {shortened(value)}, expected {problem.expected}."


def _is_given(content: Any, place: Sequence[str | int]) -> bool:
    for part in place:
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


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
