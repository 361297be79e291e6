"""Scores that papers report (`reported.yaml`), to compare with measured ones of the same protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from sail_align.evaluate.results.scores import Record

Measured = tuple[str, str, int]
"""Protocol id, metric and number of items, which a score must share with a reported one to be compared."""


@dataclass(frozen=True)
class Reported:
    """A model of a paper, with its scores in per cent."""

    name: str
    source: str
    scores: Mapping[Measured, float]

    def score(self, record: Record, metric: str) -> float | None:
        """Return the reported score of a record's protocol on its set, or None if there is none for that very set."""
        return None if record.mismatch else self.scores.get((record["protocol"], metric, record["items"]))

    @classmethod
    @cache
    def read_all(cls) -> tuple["Reported", ...]:
        """Return the models of `reported.yaml` in their order."""
        content = yaml.safe_load((resources.files(__package__) / "reported.yaml").read_text(encoding="utf-8"))
        models = []
        for model in content["models"]:
            scores = {tuple(content["measures"][name]): value for name, value in model["scores"].items()}
            models.append(cls(model["name"], model["source"], scores))
        return tuple(models)
