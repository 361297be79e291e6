"""What a task returns: outcomes by item, the numbers they make with chance and interval, and examples to look at."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.align.stats.bootstrap import Statistic, bootstrap, interval

Outcomes = Mapping[str, NDArray[Any]]
"""What came out by item, by name: hits, ranks …; saved beside the scores, so that two runs can be compared."""
Unit = Literal["%", "rank"]
Mark = Literal["right", "wrong", ""]
PICTURE_SIDE = 256


@dataclass(frozen=True)
class Measure:
    """How one number of a task comes from its outcomes; `of` and `chance` are fractions where the unit is per cent."""

    name: str
    label: str
    chance: float
    of: Statistic
    unit: Unit = "%"

    @property
    def scale(self) -> float:
        """What values are multiplied by to be shown."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Metric:
    """One number, in per cent or a rank from 1, beside what guessing would give and its 95 % interval over items."""

    name: str
    label: str
    value: float
    chance: float
    interval: tuple[float, float]
    unit: Unit = "%"


def summarise(measures: Sequence[Measure], items: int) -> tuple[Metric, ...]:
    """Return the metrics of all items, with intervals over the same bootstrap draws of them."""
    values_RM = bootstrap([measure.of for measure in measures], items)
    once_N = np.ones(items)
    metrics = []
    for column, measure in enumerate(measures):
        low, high = interval(values_RM[:, column] * measure.scale)
        value, chance = measure.of(once_N) * measure.scale, measure.chance * measure.scale
        metrics.append(Metric(measure.name, measure.label, value, chance, (low, high), measure.unit))
    return tuple(metrics)


@dataclass(frozen=True)
class Note:
    """A line beside a picture: a text, a number if there is one, whether it is right, and a colour for a legend."""

    text: str
    value: str = ""
    mark: Mark = ""
    colour: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture of an example; `alt` says what it shows to who cannot see it."""

    image: Image.Image
    alt: str
    caption: str = ""
    mark: Mark = ""
    notes: tuple[Note, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the picture as a small data URL with its texts."""
        image = self.image.convert("RGB")
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=82)
        return {
            "src": f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}",
            "size": image.size,
            "alt": self.alt,
            "caption": self.caption,
            "mark": self.mark,
            "notes": [asdict(note) for note in self.notes],
        }


@dataclass(frozen=True)
class Example:
    """One case of a task: what was asked, whether the answer was right (None: neither), and pictures."""

    title: str
    right: bool | None
    pictures: tuple[Picture, ...]
    legend: tuple[Note, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the example as JSON-able data, pictures included."""
        return {
            "title": self.title,
            "right": self.right,
            "pictures": [picture.to_json() for picture in self.pictures],
            "legend": [asdict(note) for note in self.legend],
        }


@dataclass(frozen=True)
class Result:
    """What one protocol measured on one data set.

    `items` is what the intervals resample: images, or pairs. `masks` is a digest of all masks' pixels, "" without any.
    """

    items: int
    metrics: tuple[Metric, ...]
    examples: tuple[Example, ...]
    outcomes: Outcomes
    details: dict[str, Any] = field(default_factory=dict)
    masks: str = ""


def mark(chosen: bool, right: bool) -> Mark:
    """Return the mark of one answer among several: what is right, and what was wrongly chosen."""
    if right:
        return "right"
    return "wrong" if chosen else ""


def pick_examples(hits_N: NDArray[np.bool_], each: int) -> list[int]:
    """Return up to `each` rows that were right, then as many that were wrong, spread evenly over the rows."""
    chosen: list[int] = []
    for rows in (np.flatnonzero(hits_N), np.flatnonzero(~hits_N)):
        positions = np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)
        chosen += rows[positions].tolist()
    return chosen
