"""Which captions of an image are its positives in a step, and how much each counts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.errors import UserError

MOST = 1_000.0
"""The largest weight of a caption, and one over the least: farther apart, the lighter would hardly be trained on."""


@dataclass(frozen=True)
class CaptionPolicy:
    """Captions by name with a weight each, of which `positives` are used for each image in a step.

    All of them: each caption's loss is multiplied by its weight. Fewer: they are drawn anew for each image and step
    from the captions that its store has, with the weights for odds, so that every caption set of a batch mixes long and
    short ones; their losses count alike.
    """

    weights: Mapping[str, float]
    positives: int

    @classmethod
    def all_alike(cls, captions: Iterable[str]) -> "CaptionPolicy":
        """Use every caption, with a weight of 1."""
        weights = dict.fromkeys(captions, 1.0)
        return cls(weights, len(weights))

    @property
    def drawn(self) -> bool:
        """Whether a step uses some of the captions only."""
        return self.positives < len(self.weights)

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """What each caption set's loss is multiplied by; None where that is 1."""
        weights = tuple(self.weights.values())
        return None if self.drawn or set(weights) == {1.0} else weights

    def describe(self) -> str:
        """Write the captions as `--captions` takes them, weights of 1 left out."""
        return ", ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in self.weights.items())

    def draw(self, captions: Sequence[str], rows: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Return for each of so many rows which of its captions are used, (positives, rows), as they were drawn.

        Each is drawn from those left with odds by weight: the first arrivals of as many exponential clocks.
        """
        weights = np.array([self.weights[name] for name in captions])
        arrivals = random.exponential(size=(len(captions), rows)) / weights[:, None]
        return np.argsort(arrivals, axis=0)[: self.positives]


def parse_captions(given: Sequence[str]) -> tuple[list[str], tuple[float, ...]]:
    """Return the names and the weights of captions such as `raw` (of weight 1) and `long:0.5`.

    Raises:
        UserError: A caption has no name, is given twice, or its weight is no number within the limits.
    """
    names, weights = [], []
    for each in given:
        name, colon, weight = each.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not (name and 1 / MOST <= value <= MOST):
            raise UserError(
                f"{each.strip()!r} is no caption with a weight; give a name, or one as in long:0.5, with a weight from "
                f"{1 / MOST:g} to {MOST:g}."
            )
        names.append(name)
        weights.append(value)
    if len(set(names)) < len(names):
        raise UserError(f"A caption is given twice in {','.join(given)}; name each one once.")
    return names, tuple(weights)


def choose_captions(
    stores: Sequence[Path], there: Sequence[Sequence[str]], asked: Sequence[str] | None, positives: int | None
) -> list[list[str]]:
    """Return which captions are used of each store, all in one order.

    Args:
        stores: Their paths, for messages.
        there: The captions of each.
        asked: Names; by default those that all stores have, or if `positives` is given, those that any has.
        positives: How many captions each image needs; None for all of them.

    Raises:
        UserError: A store has no captions, or where all are needed, not all that the others have.
    """
    for path, names in zip(stores, there, strict=True):
        if not names:
            raise UserError(f"{path} has no text features; make some with `sail-extract run`.")
    known, shared = list(dict.fromkeys(chain(*there))), shared_captions(there)
    captions = asked or (known if positives else shared)
    advice = f"give --captions {','.join(shared)}, which all stores have, or " if shared else "give "
    advice += "--positives 1 to draw from what each store has."
    if not captions:
        has = "; ".join(f"{path} has {', '.join(names)}" for path, names in zip(stores, there, strict=True))
        raise UserError(f"No caption is in all stores ({has}); {advice}")
    chosen = []
    for path, names in zip(stores, there, strict=True):
        used = [name for name in captions if name in names]
        possible = known if positives and used else names
        if lacking := next((name for name in captions if name not in possible), None):
            end = f"; {advice}" if lacking in known and not positives else "."
            raise UserError(f"{path} has no features of caption {lacking!r}; it has {', '.join(names)}{end}")
        chosen.append(used)
    return chosen


def shared_captions(of_stores: Sequence[Sequence[str]]) -> list[str]:
    """Return the captions that all stores have."""
    return [name for name in of_stores[0] if all(name in names for names in of_stores)]
