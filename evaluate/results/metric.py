"""Outcomes of a task, the scores computed from them, and examples for the report."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.align.stats.bootstrap import Statistic, weighted_mean

Outcomes = Mapping[str, NDArray[Any]]
"""Arrays by name with one entry per item (hits, ranks …). They are saved with the scores, to compare runs."""
GROUPS = "groups"
"""Name of the outcome that numbers the group of each item, (N,), if intervals resample groups instead of items."""
Unit = Literal["%", "rank"]
Mark = Literal["right", "wrong", ""]
PICTURE_SIDE = 256


@dataclass(frozen=True)
class Metric:
    """A number computed from outcomes.

    `compute` takes how often each item counts, (N,). Where the unit is per cent, it returns a fraction, and `chance` is
    one.
    """

    name: str
    label: str
    chance: float
    compute: Statistic
    unit: Unit = "%"

    @classmethod
    def mean(cls, name: str, label: str, chance: float, values_N: NDArray[Any]) -> "Metric":
        """Return the mean of a value per item, such as a hit."""
        return cls(name, label, chance, lambda drawn_N: weighted_mean(values_N, drawn_N))

    @property
    def scale(self) -> float:
        """Factor from computed values to displayed ones."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Annotation:
    """A line of text beside a picture, with a value, a mark, and a colour if it belongs to a legend."""

    text: str
    value: str = ""
    mark: Mark = ""
    colour: str = ""

    @classmethod
    def answer(cls, text: str, value: str, *, chosen: bool, right: bool) -> "Annotation":
        """Return one of several answers, marked if it is right or if it was chosen and is wrong."""
        return cls(text, value, "right" if right else "wrong" if chosen else "")


@dataclass(frozen=True)
class Picture:
    """A picture of an example: a small data URL and its texts. `alt` describes it to readers who cannot see it."""

    src: str
    size: tuple[int, int]
    alt: str
    caption: str = ""
    mark: Mark = ""
    notes: tuple[Annotation, ...] = ()

    @classmethod
    def of(cls, image: Image.Image, alt: str, **texts: Any) -> "Picture":
        """Return a picture of an image, scaled down."""
        image = image.convert("RGB")
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=82)
        return cls(f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}", image.size, alt, **texts)


@dataclass(frozen=True)
class Example:
    """One case of a task: the question, whether the answer was right (None: neither), and pictures."""

    title: str
    right: bool | None
    pictures: tuple[Picture, ...]
    legend: tuple[Annotation, ...] = ()


@dataclass(frozen=True)
class Result:
    """Outcomes, examples and scores of one protocol on one data set.

    Attributes:
        items: Number of images or pairs. The intervals resample these, or their groups.
        outcomes: What came out for each item.
        examples: Cases for the report.
        details: Further numbers for the report, as JSON-able data.
        masks: Digest of the pixels of all masks. Empty if there are none.
        rows: Row of each item in the set, (N,), or of both images of each pair, (N, 2). Default: item i is row i.
        scores: Value, chance level and 95 % interval over items of each metric, in per cent or as ranks from 1.
            `EvaluationTask.score` computes them from the outcomes.
    """

    items: int
    outcomes: Outcomes
    examples: Sequence[Example] = ()
    details: dict[str, Any] = field(default_factory=dict)
    masks: str = ""
    rows: NDArray[np.intp] | None = None
    scores: Sequence[dict[str, Any]] = ()


def groups_of(outcomes: Outcomes, items: int) -> NDArray[np.integer] | None:
    """Return the number of each item's group, (items,); None if every item is independent.

    Raises:
        ValueError: There is not one number per item.
    """
    groups_N = outcomes.get(GROUPS)
    if groups_N is not None and (groups_N.shape != (items,) or groups_N.dtype.kind not in "iu"):
        raise ValueError(f"got groups of shape {groups_N.shape} and type {groups_N.dtype}, expected {items} integers")
    return groups_N


def pick_examples(hits_N: NDArray[np.bool_], each: int) -> list[int]:
    """Return up to `each` rows that are right, then as many that are wrong, both spread evenly over the rows."""
    chosen: list[int] = []
    for rows in (np.flatnonzero(hits_N), np.flatnonzero(~hits_N)):
        positions = np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)
        chosen += rows[positions].tolist()
    return chosen
