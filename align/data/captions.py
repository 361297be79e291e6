"""The choice of captions that are an image's positives in a step, and their weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.errors import UserError

MAX_WEIGHT = 1_000.0
"""Largest caption weight; the smallest is its inverse. A lighter caption would hardly affect training."""


@dataclass(frozen=True)
class CaptionPolicy:
    """Caption names with weights, and the number of them used per image and step (`positives`).

    If all captions are used, each caption's loss is multiplied by its weight. If fewer are used, they are sampled for
    each image and step from the captions that it has, with probabilities in proportion to the weights. Every caption
    set of a batch then mixes long and short captions, and all losses count alike.
    """

    weights: Mapping[str, float]
    positives: int

    @classmethod
    def uniform(cls, captions: Iterable[str]) -> "CaptionPolicy":
        """Use every caption, with a weight of 1."""
        weights = dict.fromkeys(captions, 1.0)
        return cls(weights, len(weights))

    @property
    def drawn(self) -> bool:
        """Whether captions are sampled, because a step uses only some of them."""
        return self.positives < len(self.weights)

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """Factor of each caption set's loss, or None if all are 1."""
        weights = tuple(self.weights.values())
        return None if self.drawn or set(weights) == {1.0} else weights

    def describe(self) -> str:
        """Return the captions in the form that `--captions` accepts; weights of 1 are left out."""
        return ", ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in self.weights.items())

    def draw(
        self,
        captions: Sequence[str],
        rows: int,
        random: np.random.Generator,
        present: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.int64]:
        """Sample captions without replacement for each row; return their positions in `captions`, (positives, rows).

        A caption is chosen among the remaining ones with odds by weight. This equals the order in which exponential
        clocks, whose rates are the weights, ring first.

        Args:
            captions: Names of the captions.
            rows: Number of rows.
            random: Source of random numbers.
            present: Which captions (captions, rows) each row has: at least as many as are drawn. All by default.
        """
        weights = np.array([self.weights[name] for name in captions])
        arrivals = random.exponential(size=(len(captions), rows)) / weights[:, None]
        if present is not None:
            arrivals[~present] = np.inf
        return np.argsort(arrivals, axis=0)[: self.positives]


def parse_captions(values: Sequence[str]) -> dict[str, float]:
    """Return the weights of captions by name, given captions such as `raw` (of weight 1) or `long:0.5`.

    Raises:
        UserError: A caption has no name or is repeated, or its weight is not a number within the limits.
    """
    weights: dict[str, float] = {}
    for value in map(str.strip, values):
        name, colon, number = value.partition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not (name and 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT):
            raise UserError(
                f"Caption {value!r} is invalid: expected NAME or NAME:WEIGHT, with a weight from {1 / MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}."
            )
        weights[name] = weight
    if len(weights) < len(values):
        raise UserError(f"A caption is repeated in {','.join(values)}; name each caption once.")
    return weights


def choose_captions(
    stores: Sequence[Path], available: Sequence[Sequence[str]], requested: Sequence[str], positives: int | None
) -> list[list[str]]:
    """Return the captions to use of each store, all in the same order.

    Args:
        stores: Paths of the stores, for error messages.
        available: Captions of each store.
        requested: Caption names. If empty, the captions that all stores have, or, if `positives` is given, the
            captions that any store has.
        positives: Number of captions that each image needs; None for all of them.

    Raises:
        UserError: A store has no captions or, if all are needed, lacks one.
    """
    for path, names in zip(stores, available, strict=True):
        if not names:
            raise UserError(f"{path} has no text features. Create some with `sail-extract run`.")
    known = list(dict.fromkeys(chain(*available)))
    shared = [name for name in known if all(name in names for names in available)]
    captions = requested or (known if positives else shared)
    advice = f"Use --captions {','.join(shared)}, which all stores have, or " if shared else "Use "
    advice += "--positives 1 to sample from the captions of each store."
    if not captions:
        listing = "; ".join(f"{path} has {', '.join(names)}" for path, names in zip(stores, available, strict=True))
        raise UserError(f"No caption is in all stores: {listing}. {advice}")
    chosen = []
    for path, names in zip(stores, available, strict=True):
        used = [name for name in captions if name in names]
        # With sampling, a store may lack some captions as long as it has one of them.
        accepted = known if positives and used else names
        if missing := next((name for name in captions if name not in accepted), None):
            end = f" {advice}" if missing in known and not positives else ""
            raise UserError(f"{path} has no features of caption {missing!r}. It has {', '.join(names)}.{end}")
        chosen.append(used)
    return chosen
