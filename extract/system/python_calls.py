"""Functions of the public API: what they accept and how their errors read in Python."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import as_path
from sail_align.extract.system.signals import StoppedError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PathLike = str | os.PathLike[str]
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?:=|\b)")


def in_python(message: str, parameters: Iterable[str]) -> str:
    """Return a message with a function's parameters in place of a command's options: `--batch-size` → `batch_size`.

    Commands in backticks, and options that are not parameters, stay as they are.
    """
    known = set(parameters)

    def rename(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return f"`{name}`" if name in known else found[0]

    parts = message.split("`")
    return "`".join(part if number % 2 else _OPTION.sub(rename, part) for number, part in enumerate(parts))


def python_call(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function that a command shares, made for Python.

    Errors name its parameters instead of the command's options, and Ctrl-C raises `KeyboardInterrupt`.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as problem:
            problem.args = (in_python(str(problem), inspect.signature(function).parameters), *problem.args[1:])
            raise
        except StoppedError as stopped:
            if stopped.name == "Ctrl-C":
                raise KeyboardInterrupt from stopped
            raise

    return call


def as_paths(value: PathLike | Sequence[PathLike], name: str) -> list[Path]:
    """Return one or several paths or URLs, or objects that have one, such as stores and runs, as a list of paths.

    Args:
        value: The path or paths.
        name: Name of the argument, for messages.

    Raises:
        UserError: There is no path, or something else is among them.
    """
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise UserError(f"{name} is invalid: got an empty list, expected a path or several.")
    paths = []
    for each in values:
        if isinstance(each, str | os.PathLike) and not isinstance(each, Path):
            each = as_path(os.fspath(each))
        if not hasattr(each, "iterdir"):  # neither a Path nor universal_pathlib's
            raise UserError(f"{name} is invalid: got {repr(each)[:80]}, expected a path or several.")
        paths.append(each)
    return paths


def one_path(value: PathLike, name: str) -> Path:
    """Return one path. See `as_paths`."""
    if isinstance(value, list | tuple):
        raise UserError(f"{name} is invalid: got {repr(value)[:80]}, expected one path.")
    return as_paths(value, name)[0]
