"""Scores that papers report (`reported.yaml`), to stand beside measured ones of the same protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml


@dataclass(frozen=True)
class Reported:
    """A model of a paper: its scores in per cent, by protocol id and metric."""

    name: str
    source: str
    scores: Mapping[tuple[str, str], float]


@cache
def reported() -> tuple[Reported, ...]:
    """Return the models of `reported.yaml`, in its order."""
    told = yaml.safe_load((resources.files(__package__) / "reported.yaml").read_text(encoding="utf-8"))
    measures = {name: (protocol, metric) for name, (protocol, metric) in told["measures"].items()}
    return tuple(
        Reported(each["name"], each["source"], {measures[name]: value for name, value in each["scores"].items()})
        for each in told["models"]
    )
