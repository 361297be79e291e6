"""Labels of samples: names of classes, and the values of a column that stand for them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sail_align.extract.errors import UserError, listing
from sail_align.extract.sources import class_names
from sail_align.extract.sources.config import NonEmpty
from sail_align.extract.sources.file_set import FileSet

ClassList = NonEmpty | Annotated[list[str], Field(min_length=1)]
"""A file under `root` (or a URL) with one name per line, a published list (`open_clip:imagenet`), or the names."""

_NUMBER = re.compile(r"(-?[0-9]{1,18})(\.0+)?")
"""A number as tables write it. pandas writes a column of integers with missing values as 3.0."""


def read_class_list(classes: ClassList, files: FileSet) -> tuple[str, ...]:
    """Return class names in label order.

    Raises:
        UserError: The file or the published list does not exist.
    """
    if not isinstance(classes, str):
        return tuple(classes)
    if classes.startswith(class_names.LIBRARIES):
        return tuple(class_names.class_names(classes))
    with files.open(files.add(classes)) as file:
        return tuple(line.strip() for line in file.read().decode("utf-8-sig").splitlines() if line.strip())


@dataclass(frozen=True)
class Labels:
    """The classes of a column.

    Attributes:
        classes: Names of the classes. Label i stands for `classes[i]`.
        label_of: Label of each value that stands for a class other than by its number.
        by_number: Whether the values may be numbers of classes.
    """

    classes: tuple[str, ...]
    label_of: Mapping[str, int]
    by_number: bool

    @classmethod
    def named(cls, names: Iterable[str], *, numbers: bool = False) -> "Labels":
        """Return labels by names of classes, or by their numbers unless a name is itself a number.

        Args:
            names: The names, in label order.
            numbers: Whether the column contains numbers only, which are then never names.
        """
        names = tuple(names)
        known = {} if numbers else {name: names.index(name) for name in names}  # the first of two of one name
        return cls(names, known, numbers or not any(map(_NUMBER.fullmatch, names)))

    @classmethod
    def mapped(cls, names: Mapping[str, str]) -> "Labels":
        """Return labels by the values of a column, each with the name of its class."""
        return cls(tuple(names.values()), {value: label for label, value in enumerate(names)}, False)

    @classmethod
    def found(cls, column: str, values: Callable[[], Iterable[str | None]]) -> "Labels":
        """Return labels whose classes are the distinct texts of a column, sorted.

        Raises:
            UserError: The column contains numbers only, or nothing.
        """
        names = sorted({text for value in values() if (text := _text(value))})
        if not names or all(map(_NUMBER.fullmatch, names)):
            got = f"the numbers {listing(names, 5)}" if names else "no values"
            raise UserError(
                f"Column {column!r} is invalid: got {got}, expected names of classes. Set source.classes to the names."
            )
        return cls(tuple(names), {name: label for label, name in enumerate(names)}, False)

    def of(self, value: str | int | None, where: str) -> int:
        """Return the label that a value stands for, −1 for none.

        Raises:
            UserError: The value stands for no class; `where` names its row.
        """
        text = _text(value)
        if not text:
            return -1
        if (label := self.label_of.get(text)) is not None:
            return label
        number = _NUMBER.fullmatch(text)
        if number and (plain := self.label_of.get(number[1])) is not None:
            return plain
        if number and self.by_number and -1 <= int(number[1]) < len(self.classes):
            return int(number[1])
        numbers = [f"0 to {len(self.classes) - 1}"] if self.by_number else []
        expected = " or ".join([*numbers, *([listing(self.label_of, 8)] if self.label_of else [])])
        raise UserError(
            f"Label of {where} is invalid: got {text[:80]!r}, expected {expected}. Correct it or source.classes."
        )


def _text(value: str | int | None) -> str:
    return "" if value is None or value != value else str(value).strip()
