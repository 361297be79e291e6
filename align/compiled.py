"""Functions of a block, compiled by torch where that works and pays."""

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class Compiled(Generic[Arguments, Result]):
    """A function that can be called as it is, or compiled: many passes over its tensors are then one.

    `torch.compile` needs a C++ compiler on a CPU and Triton on a GPU, and takes some seconds at the first call. Where
    it fails the function is used as it is from then on: slower, and the same but for rounding.

    Attributes:
        failure: Why it could not be compiled, if that was tried and failed; it is logged too.
    """

    def __init__(self, function: Callable[Arguments, Result]):
        self._function = function
        self._compiled: Callable[Arguments, Result] | None = None
        self.failure: str | None = None

    def __call__(self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        """Call the function as it is."""
        return self._function(*arguments, **options)

    def quick(self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        """Call the function compiled, if it can be compiled."""
        if self.failure is not None:
            return self._function(*arguments, **options)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=True)
            return self._compiled(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError) as error:  # of the compiler: it fails before anything is computed
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            _logger.warning("not compiled, which is slower: %s", self.failure)
            return self._function(*arguments, **options)
