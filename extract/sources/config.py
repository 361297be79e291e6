"""Base classes for the models that describe a source, or other files, in a manifest."""

import os
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from sail_align.extract.data import Source
from sail_align.extract.errors import UserError
from sail_align.extract.sources.file_set import RANGE, matches

NonEmpty = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A frozen model that rejects unknown fields, because an unknown field is usually a misspelt one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    omitted: ClassVar[frozenset[str]] = frozenset()
    """Fields that stores do not record while they have their default, so that stores without them can be resumed."""

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        recorded: dict[str, Any] = serialize(self)
        for name in self.omitted & recorded.keys():
            if getattr(self, name) == type(self).model_fields[name].get_default():
                del recorded[name]
        return recorded


class SourceConfig(Strict):
    """Description of a source in a manifest.

    Each subclass with a field `kind` is one kind of source. The manifest finds it if it is defined in a module of
    `sail_align.extract.sources`, or in the module `source` of a package there.
    """

    @property
    def urls(self) -> list[str]:
        """URLs that the source may open. Nothing else is fetched, regardless of the content of its files."""
        return []

    @abstractmethod
    def requirements(self, data_root: Path) -> dict[str, bool]:
        """Return the files, folders or packages that the source needs, and whether each is present."""

    @abstractmethod
    def open(self, data_root: Path) -> Source:
        """Open the source.

        Raises:
            UserError: Its files are missing or do not match the description.
        """


class FilesConfig(Strict):
    """Description of files under `root`, a folder under the data root."""

    root: str = "."

    @property
    def needs(self) -> list[str]:
        """The required files and folders under `root`, as names or as patterns with `*`."""
        return ["."]

    def requirements(self, data_root: Path) -> dict[str, bool]:
        """Return the required files and folders, and whether each is present."""
        root = data_root / self.root
        return {str(root / need): _is_present(root, need) for need in self.needs}


class PathsConfig(FilesConfig):
    """Description of files that name others: tables, annotations, rows of a data set.

    With `allow_outside`, paths in them may lead out of the data root. It decides no row, so stores do not record it.
    """

    allow_outside: bool = Field(default=False, exclude=True)


def _is_present(root: Path, need: str) -> bool:
    """Return whether a file or folder exists, or a pattern matches one. A range counts if any number matches."""
    try:
        return any(os.path.exists(path) for path in matches(root, RANGE.sub("*", need)))
    except UserError:
        return False
