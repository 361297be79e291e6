"""The record that a store keeps of the features that it was made of, as the source in its manifest."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store
from sail_align.extract.system.validation import validated

File = Annotated[list[str], Field(min_length=2, max_length=2)]
"""Name and SHA-256 of a file."""


class FeaturesForm(TypedDict):
    """Features of one side: their files, the tables with their texts, and what they hold."""

    files: Annotated[list[File], Field(min_length=1)]
    tables: list[File]
    dtype: str
    dim: int


class AgreementForm(TypedDict):
    """Agreement of imported features with those of the named encoder."""

    rows: int
    cosine: float
    norms: str


class EncoderForm(TypedDict, total=False):
    """An encoder that was named; nothing if it is unknown."""

    name: str
    pooling: str | None
    compared: AgreementForm | None


class SourceForm(TypedDict):
    """Everything that decides the rows and features of an imported store."""

    kind: Literal["imported"]
    features: dict[str, FeaturesForm]
    joined_by: str
    captions: dict[str, str]
    image_column: NotRequired[str | None]
    encoders: dict[str, EncoderForm]


def read_record(store: Store) -> SourceForm:
    """Return the record of an imported store. Raises `UserError` if it is damaged."""
    try:
        record: SourceForm = validated(SourceForm, store.attributes["manifest"]["source"])
    except ValueError as problem:
        raise UserError(f"{store.path / 'zarr.json'} is damaged: {problem}. Restore it.") from problem
    return record
