"""The settings that `sail-align tune` compares: a deterministic sequence of candidates, and the rows to compare on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sail_align.align.data.pairs import MAX_HELD_OUT, Rows, count_rows, held_out_pictures
from sail_align.align.settings import PRESETS, SETTINGS, check_options, choose_settings, default_preset, unused_beside
from sail_align.align.train.plan import Plan
from sail_align.extract.errors import UserError

FOLDS = 5
CHANGE = 0.4
"""Probability that a candidate changes a setting."""
DRAWS = 10_000
"""Draws after which the space counts as exhausted."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Fold:
    """Rows of each store to train on and to choose on."""

    training: Sequence[Rows]
    chosen_on: Sequence[Rows]


def make_folds(plan: Plan, count: int) -> list[Fold]:
    """Split the training rows of a plan into fifths and return the first `count` folds: each chooses on one fifth.

    A fold chooses on at most 5,000 rows. As in a fit, it does not train on rows whose picture is among them. The
    plan's held-out rows are in no fold.
    """
    total = count_rows(plan.training)
    fold_N = np.random.default_rng(0).permutation(total) % FOLDS
    bounds = np.cumsum([0, *(int(rows.sum()) for rows in plan.training)])
    folds = []
    for number in range(count):
        chosen_N = np.flatnonzero(fold_N == number)
        chosen_N = np.sort(np.random.default_rng(number).permutation(chosen_N)[:MAX_HELD_OUT])
        chosen_on = []
        for at, rows in enumerate(plan.training):
            mine = chosen_N[(chosen_N >= bounds[at]) & (chosen_N < bounds[at + 1])] - bounds[at]
            mask = np.zeros_like(rows)
            mask[np.flatnonzero(rows)[mine]] = True
            chosen_on.append(mask)
        training = [rows & ~held for rows, held in zip(plan.training, chosen_on, strict=True)]
        copies = held_out_pictures(plan.pairs, training, chosen_on)
        folds.append(Fold([rows & ~copy for rows, copy in zip(training, copies, strict=True)], chosen_on))
    return folds


@dataclass(frozen=True)
class Space:
    """The candidates around the preset of a plan.

    Attributes:
        plan: A plan of all rows with the default settings.
        given: Options that all candidates share.
    """

    plan: Plan
    given: Mapping[str, Any]

    @property
    def preset(self) -> str:
        """Name of the preset that `fit` takes."""
        return str(self.given.get("preset") or default_preset(self.plan.training_rows))

    def planned(self, options: Mapping[str, Any], fold: Fold, number: int) -> Plan:
        """Return the plan of a candidate on a fold, whose number is its seed.

        Raises:
            UserError: The options do not fit each other.
        """
        checked = check_options({**self.given, **options})
        image_dim, text_dim = self.plan.pairs[0].image.dim, self.plan.pairs[0].texts[0].dim
        # The bank corrects similarities after training; candidates are compared by cosine.
        extra = {"preset": self.preset, "bank": 0, "seed": number}
        rows = count_rows(fold.training)
        dims = {"image_dim": image_dim, "text_dim": text_dim}
        settings, _ = choose_settings({**checked, **extra}, rows=rows, size=self.plan.training_rows, **dims)
        settings = replace(settings, held_out=self.plan.settings.held_out)
        return replace(self.plan, training=fold.training, held_out=fold.chosen_on, settings=settings)

    def candidates(self, fold: Fold, seed: int) -> Iterator[Options]:
        """Yield options that differ in their effect: none, which is the default, each head, then random changes.

        The sequence depends on the space and the seed only.
        """
        usual = {**PRESETS[self.preset], **vars(self.planned({}, fold, 0).settings)}
        open_names = [name for name, each in SETTINGS.items() if each.search and name not in self.given]
        random = np.random.default_rng(seed)
        seen = set()
        heads: list[Options] = [{"head": head} for head in SETTINGS["head"].search if "head" in open_names]
        for number in range(DRAWS):
            if number <= len(heads):
                drawn = [{}, *heads][number]
            else:
                picks = {name: random.integers(len(SETTINGS[name].search)) for name in open_names}
                drawn = {name: SETTINGS[name].search[pick] for name, pick in picks.items() if random.random() < CHANGE}
            options = {name: value for name, value in drawn.items() if value != usual.get(name)}
            together = {"head": usual["head"], **self.given, **options}
            options = {name: value for name, value in options.items() if not unused_beside(name, together)}
            try:
                settings = self.planned(options, fold, 0).settings
            except UserError:  # such as a dimension above that of the features
                continue
            if settings not in seen:
                seen.add(settings)
                yield options
