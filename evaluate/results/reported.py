"""Scores that papers report (`reported.yaml`), to stand beside measured ones of the same protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from sail_align.evaluate.results.scores import Record, unexpected

Measured = tuple[str, str, int]
"""Protocol id, metric, and the number of items: what a score must share with a reported one to stand beside it."""


@dataclass(frozen=True)
class Reported:
    """A model of a paper, and its scores in per cent."""

    name: str
    source: str
    scores: Mapping[Measured, float]

    def score(self, record: Record, metric: str) -> float | None:
        """Return what is reported of a record's protocol on its set; None if nothing is, or if the set is another."""
        return None if unexpected(record) else self.scores.get((record["protocol"], metric, record["items"]))


@cache
def reported() -> tuple[Reported, ...]:
    """Return the models of `reported.yaml`, in its order."""
    told = yaml.safe_load((resources.files(__package__) / "reported.yaml").read_text(encoding="utf-8"))
    return tuple(
        Reported(
            model["name"],
            model["source"],
            {tuple(told["measures"][name]): value for name, value in model["scores"].items()},
        )
        for model in told["models"]
    )
