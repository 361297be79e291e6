"""Detection of collapsed training from the lines of a run's log.

Each threshold lies between the values of runs on real photos that learned and of runs that collapsed; docs/training.md
has the numbers. The result depends on the logged lines alone, so a resumed run sees the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sail_align.align.runs.folder import BEGIN_AGAIN, RunFolder, damaged, parse_entry, read_file

NEAR_CHANCE, NEAR_CHANCE_SHARE = 5.0, 0.1
"""R@1 is near chance below this multiple of the chance level, which runs that learn soon exceed. With few pairs, where
chance is high, the bound is at most this share of the way from chance to 100."""

FORGOTTEN = 0.1
"""A run has forgotten if this share, or less, is left of its best R@1 above chance or of its largest gap."""

LEARNED_GAP = 0.05
"""Difference between the mean cosines of positives and negatives that shows learning."""

PATIENT_STEPS = 20
"""Steps for which the gap must be lost. Runs with too high an initial rate lost it for a few steps, then learned."""

PATIENT_SCORINGS = 2
"""Consecutive scorings that must show a collapse."""

LOST_RANK = 0.2
"""Embeddings have collapsed if this share, or less, is left of their initial effective rank."""

DROWNED = 100.0
"""Ratio of the gradient masses of negatives and positives at which nothing is learned."""

DROWNED_AT_FIRST = 10.0
"""The same ratio in the first batch. Embeddings can balance it by shrinking as well as by learning, so R@1 must also
stay near chance for some time: a fit of few steps may only have begun to learn."""

SCORINGS_AT_CHANCE, STEPS_AT_CHANCE = 5, 50
"""Consecutive scorings, and steps between the first and last of them, for which R@1 must stay near chance."""


@dataclass
class Watch:
    """State of the collapse detection after the log so far. `lr` is the peak learning rate, for the advice."""

    lr: float
    _best_r1: float = -math.inf
    _ranks: tuple[float, float] | None = None
    _best_gap: float = 0.0
    _steps_lost: int = 0
    _scorings_lost: int = 0
    _near_chance: list[int] = field(default_factory=list)
    """Steps of the latest scorings, as long as all were near chance."""
    _first: Mapping[str, float] = field(default_factory=dict)
    _last: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def replay(cls, run: Path, lr: float) -> str | None:
        """Return the first message about a collapse in the log of a run, None if there is none.

        Raises:
            UserError: The log is missing or damaged.
        """
        watch, path = cls(lr), RunFolder(run).metrics
        for line in read_file(path, BEGIN_AGAIN).decode(errors="replace").splitlines():
            if (values := parse_entry(f"{line}\n")) is None:
                raise damaged(path, BEGIN_AGAIN)
            if message := watch.see(values.pop("kind"), values.pop("step"), values):
                return message
        return None

    def see(self, kind: str, step: int, values: Mapping[str, float]) -> str | None:
        """Add a line of the log; if training has collapsed, return what happened and what to change."""
        seen = self._see_step(values) if kind == "train" else self._see_scores(step, values)
        return seen and f"Training collapsed at step {step:,}: {seen}, or continue with --on-collapse warn."

    def _see_step(self, values: Mapping[str, float]) -> str | None:
        self._first, self._last = self._first or values, values
        gap = (values["positive_logit"] - values["negative_logit"]) / values["t"]
        self._best_gap = max(self._best_gap, gap)
        lost = self._best_gap >= LEARNED_GAP and gap < FORGOTTEN * self._best_gap
        self._steps_lost = self._steps_lost + 1 if lost else 0
        if self._steps_lost < PATIENT_STEPS:
            return None
        return (
            f"the mean cosine of positives exceeds that of negatives by {gap:.2g}, after {self._best_gap:.2g} before. "
            f"{self._advice()}"
        )

    def _see_scores(self, step: int, values: Mapping[str, float]) -> str | None:
        ranks = values["image_rank"], values["text_rank"]
        self._ranks = self._ranks or ranks
        self._best_r1 = max(self._best_r1, values["r1"])
        is_near = values["r1"] < _chance_bound(values["chance"])
        self._near_chance = [*self._near_chance, step] if is_near else []
        lost = self._lost(values["r1"], values["chance"], ranks)
        self._scorings_lost = 0 if lost is None else self._scorings_lost + 1
        return lost if self._scorings_lost >= PATIENT_SCORINGS else None

    def _lost(self, r1: float, chance: float, ranks: tuple[float, float]) -> str | None:
        if not self._near_chance or self._ranks is None:
            return None
        now = f"held-out R@1 is {r1:.1f} (chance {chance:.2g})"
        if self._best_r1 >= _chance_bound(chance) and r1 - chance <= FORGOTTEN * (self._best_r1 - chance):
            return f"{now}, after {self._best_r1:.1f} before. {self._advice()}"
        now += f". {self._advice(learned=False)}"
        for side, rank, before in zip(("image", "text"), ranks, self._ranks, strict=True):
            if rank <= LOST_RANK * before:
                return f"the effective rank of {side} embeddings is {rank:.1f}, after {before:.1f} before, and {now}"
        if (ratio := _mass_ratio(self._last)) >= DROWNED:
            return f"negatives outweigh positives {ratio:.0f} times in the gradient, and {now}"
        waited = self._near_chance[-1] - self._near_chance[0]
        patient = len(self._near_chance) >= SCORINGS_AT_CHANCE and waited >= STEPS_AT_CHANCE
        if patient and (ratio := _mass_ratio(self._first)) >= DROWNED_AT_FIRST:
            return f"negatives outweighed positives {ratio:.0f} times in the first batch, and {now}"
        return None

    def _advice(self, *, learned: bool = True) -> str:
        """Return what to change. The first batch matters only if nothing was learned after it."""
        if _mass_ratio(self._last) >= DROWNED or (not learned and _mass_ratio(self._first) >= DROWNED_AT_FIRST):
            t, b = self._last["t"], self._last["b"]
            return f"Start with --temperature auto (t is now {t:.3g} and b {b:.3g})"
        return f"Lower --lr (now {self.lr:g}), lengthen --warmup"


def _chance_bound(chance: float) -> float:
    """Return the R@1 below which a run is near chance."""
    return min(NEAR_CHANCE * chance, chance + NEAR_CHANCE_SHARE * (100 - chance))


def _mass_ratio(values: Mapping[str, float]) -> float:
    positive, negative = (values.get(f"{name}_mass", 0.0) for name in ("positive", "negative"))
    return negative / positive if positive > 0 else 0.0
