"""The form of `scores.json` and of examples, which may come from someone else with a digest of their own."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


class MetricForm(TypedDict):
    """One score."""

    name: str
    label: str
    value: Number
    chance: Number
    unit: Literal["%", "rank"]
    interval: NotRequired[Interval | None]


class _Data(TypedDict):
    digest: str
    rows: Count
    captions: NotRequired[Count]
    expected_rows: NotRequired[Count | None]
    expected_captions: NotRequired[Count | None]
    left_out: NotRequired[dict[str, Count]]


class _Store(TypedDict):
    path: str
    digest: str


class _Confusion(TypedDict):
    truth: str
    taken_for: str
    count: Count
    of: Count


class _Details(TypedDict, total=False):
    by_tag: dict[str, dict[str, Count | list[Number]]]
    by_category: dict[str, dict[str, Count | list[Number]]]
    confusions: list[_Confusion]
    iou: dict[str, Number]


class DescriptionForm(TypedDict):
    """The fields of every record, even of a set that could not be scored or of a task of another version."""

    dataset: str
    task: str
    title: NotRequired[str]
    variants: NotRequired[list[str]]
    error: NotRequired[str]


class RecordForm(DescriptionForm):
    """The scores of one set under one protocol."""

    protocol: str
    items: Annotated[int, Field(ge=1, lt=1 << 31)]
    resampled: NotRequired[Literal["groups"]]
    groups: NotRequired[Count]
    data: _Data
    metrics: list[MetricForm]
    details: _Details
    run: str
    encoders: dict[str, str]
    stores: dict[str, _Store]
    versions: dict[str, str]
    examples_sha256: NotRequired[str]
    outcomes_sha256: NotRequired[str]


class _Run(TypedDict):
    name: str
    digest: str
    unfinished: NotRequired[str]


class _Encoder(TypedDict):
    id: str
    pooling: str
    dim: int
    fingerprint: str


class ScoresForm(TypedDict):
    """The content of `scores.json`. Each record is checked on its own."""

    schema: int
    run: _Run
    encoders: dict[Literal["image", "text"], _Encoder]
    records: list[dict[str, Any]]


class _Annotation(TypedDict):
    text: str
    value: str
    mark: str
    colour: str


class _Picture(TypedDict):
    src: str
    size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    alt: str
    caption: str
    mark: str
    notes: list[_Annotation]


class ExampleForm(TypedDict):
    """An `Example` as JSON."""

    title: str
    right: bool | None
    pictures: list[_Picture]
    legend: list[_Annotation]
