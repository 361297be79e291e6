"""Which captions of an image are its positives in a step, and how much each counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.errors import UserError


@dataclass(frozen=True)
class CaptionPolicy:
    """Captions with a weight each, of which `positives` are used for each image in a step.

    All of them: each caption's loss is multiplied by its weight. Fewer: they are drawn anew for each image and step,
    with the weights for odds, so that every caption set of a batch mixes long and short ones; their losses count alike.
    """

    weights: tuple[float, ...]
    positives: int

    @classmethod
    def all_alike(cls, captions: int) -> "CaptionPolicy":
        """Use every caption, with a weight of 1."""
        return cls((1.0,) * captions, captions)

    @property
    def drawn(self) -> bool:
        """Whether a step uses some of the captions only."""
        return self.positives < len(self.weights)

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """What each caption set's loss is multiplied by; None where that is 1."""
        return None if self.drawn or set(self.weights) == {1.0} else self.weights

    def draw(self, rows: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Return the captions of each row, (positives, rows), in the order in which they were drawn.

        Each is drawn from those left with odds by weight: the first arrivals of as many exponential clocks.
        """
        arrivals = random.exponential(size=(len(self.weights), rows)) / np.array(self.weights)[:, None]
        return np.argsort(arrivals, axis=0)[: self.positives]


def parse_captions(given: Sequence[str]) -> tuple[list[str], tuple[float, ...]]:
    """Return the names and the weights of captions such as `raw` (of weight 1) and `long:0.5`.

    Raises:
        UserError: A caption has no name, is given twice, or its weight is no number above 0.
    """
    names, weights = [], []
    for each in given:
        name, colon, weight = each.strip().partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not (name and 0 < value < math.inf):
            raise UserError(f"{each.strip()!r} is no caption with a weight; give a name, or one as in long:0.5.")
        names.append(name)
        weights.append(value)
    if len(set(names)) < len(names):
        raise UserError(f"A caption is given twice in {','.join(given)}; name each one once.")
    return names, tuple(weights)
