"""Sees from what a run logs when its training has collapsed, and says so in a sentence.

Every limit lies between what runs on real photos that learned and runs that collapsed have shown: docs/training.md has
the numbers. What is seen depends on the logged lines alone, so a resumed run sees the same.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sail_align.align.runs.folder import BEGIN_AGAIN, read_file

NEAR_CHANCE, OF_THE_REST = 5.0, 0.1
"""Held-out R@1 below so many times its chance level says next to nothing; runs that learn are beyond it early. Of few
pairs, whose chance level is high, a tenth of the way from there to 100 is beyond it too."""

FORGOTTEN = 0.1
"""Share of the best R@1 above chance, or of the largest gap, that a run which forgot has at most."""

LEARNED_GAP = 0.05
PATIENT_STEPS = 20
"""A gap between the cosines of positives and negatives; and for how many steps it must be lost. Runs that began with
too high a rate lost it for a few steps and learned all the same."""

PATIENT_SCORINGS = 2
"""How many scorings in a row must say that all is lost."""

LOST_RANK = 0.2
"""Share of its effective rank at the start that a side has left at most."""

DROWNED = 100.0
"""Gradient mass of the negatives over that of the positives."""

DROWNED_AT_FIRST = 10.0
SCORINGS_AT_CHANCE, STEPS_AT_CHANCE = 5, 50
"""The same in the first batch, which embeddings balance by shrinking as well as by learning; and for how many scorings
in a row, and steps, R@1 must then have been near chance: a fit of few steps may only have begun to learn."""


@dataclass
class Watch:
    """What was seen of a run so far. `lr` is its highest rate, for the advice."""

    lr: float
    _best_r1: float = -math.inf
    _ranks: tuple[float, float] | None = None
    _best_gap: float = 0.0
    _steps_lost: int = 0
    _scorings_lost: int = 0
    _near_chance: list[int] = field(default_factory=list)
    """Steps of the last scorings, as far as they are near chance."""
    _first: Mapping[str, float] = field(default_factory=dict)
    _last: Mapping[str, float] = field(default_factory=dict)

    def see(self, kind: str, step: int, values: Mapping[str, float]) -> str | None:
        """Take in a line of the log; return what it shows and what to change, if training has collapsed."""
        seen = self._trained(values) if kind == "train" else self._scored(step, values)
        return seen and f"Training has collapsed at step {step:,}: {seen}, or go on with --on-collapse warn."

    def _trained(self, values: Mapping[str, float]) -> str | None:
        self._first, self._last = self._first or values, values
        gap = (values["positive_logit"] - values["negative_logit"]) / values["t"]
        self._best_gap = max(self._best_gap, gap)
        lost = self._best_gap >= LEARNED_GAP and gap < FORGOTTEN * self._best_gap
        self._steps_lost = self._steps_lost + 1 if lost else 0
        if self._steps_lost < PATIENT_STEPS:
            return None
        before = f"after {self._best_gap:.2g} before"
        return f"pairs that belong together are {gap:.2g} more alike (cosine) than others, {before}; {self._advice()}"

    def _scored(self, step: int, values: Mapping[str, float]) -> str | None:
        ranks = values["image_rank"], values["text_rank"]
        self._ranks = self._ranks or ranks
        self._best_r1 = max(self._best_r1, values["r1"])
        self._near_chance = [*self._near_chance, step] if values["r1"] < _next_to_nothing(values["chance"]) else []
        lost = self._lost(values["r1"], values["chance"], ranks)
        self._scorings_lost = 0 if lost is None else self._scorings_lost + 1
        return lost if self._scorings_lost >= PATIENT_SCORINGS else None

    def _lost(self, r1: float, chance: float, ranks: tuple[float, float]) -> str | None:
        if not self._near_chance or self._ranks is None:
            return None
        now = f"held-out R@1 is {r1:.1f} (chance {chance:.2g})"
        if self._best_r1 >= _next_to_nothing(chance) and r1 - chance <= FORGOTTEN * (self._best_r1 - chance):
            return f"{now}, after {self._best_r1:.1f} before; {self._advice()}"
        now += f"; {self._advice(learned=False)}"
        for side, rank, before in zip(("image", "text"), ranks, self._ranks, strict=True):
            if rank <= LOST_RANK * before:
                return (
                    f"the {side} embeddings have an effective rank of {rank:.1f}, after {before:.1f} before, and {now}"
                )
        if (ratio := _mass_ratio(self._last)) >= DROWNED:
            return f"negatives outweigh positives {ratio:.0f} times in the gradient, and {now}"
        waited = self._near_chance[-1] - self._near_chance[0]
        patient = len(self._near_chance) >= SCORINGS_AT_CHANCE and waited >= STEPS_AT_CHANCE
        if patient and (ratio := _mass_ratio(self._first)) >= DROWNED_AT_FIRST:
            return f"negatives outweighed positives {ratio:.0f} times in the first batch, and {now}"
        return None

    def _advice(self, *, learned: bool = True) -> str:
        """Say what to change; what had `learned` did so in spite of its first batch."""
        if _mass_ratio(self._last) >= DROWNED or (not learned and _mass_ratio(self._first) >= DROWNED_AT_FIRST):
            t, b = self._last["t"], self._last["b"]
            return f"start with --temperature auto (t is now {t:.3g} and b {b:.3g})"
        return f"lower --lr (now {self.lr:g}), warm up longer (--warmup)"


def _next_to_nothing(chance: float) -> float:
    return min(NEAR_CHANCE * chance, chance + OF_THE_REST * (100 - chance))


def _mass_ratio(values: Mapping[str, float]) -> float:
    positive, negative = (values.get(f"{name}_mass", 0.0) for name in ("positive", "negative"))
    return negative / positive if positive > 0 else 0.0


def collapse_of(run: Path, lr: float) -> str | None:
    """Return the sentence that says how a run's training collapsed, if its log shows that it did."""
    watch = Watch(lr)
    for line in read_file(run / "metrics.jsonl", BEGIN_AGAIN).splitlines():
        values = json.loads(line)
        if seen := watch.see(values.pop("kind"), values.pop("step"), values):
            return seen
    return None
