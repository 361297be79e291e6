"""Checks of a store's features, from the store alone: do captions belong to their images, are features plausible?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sail_align.extract.data import Status
from sail_align.extract.quality.pairing import MIN_TESTED, Half, ImageMap, Mask, Pairing, Places, Verdict
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store

SAMPLE_ROWS = 16_384
SPAN_ROWS = 128
NOTED = 0.1
"""Share of wrong captions from which it is reported."""


@dataclass
class Diagnosis:
    """Result of examining a store.

    Attributes:
        lines: Facts about each array and each pair of arrays, as text.
        reasons: Verdict on each pair of arrays, with its reason.
        scores: Numbers of each pair that was tested, by name, as `lines` has them.
    """

    lines: list[str] = field(default_factory=list)
    reasons: list[tuple[Verdict, str]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict on any pair of arrays; unknown if there is none."""
        return max((verdict for verdict, _ in self.reasons), default=Verdict.UNKNOWN)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict with its numbers, ready for JSON."""
        about = {"verdict": self.verdict.name.lower(), "summary": self.summary}
        return {**about, "pairs": self.scores, "facts": self.lines}

    @property
    def summary(self) -> str:
        """The verdict in words, with its reasons."""
        worst = self.verdict
        reasons = "; ".join(reason for verdict, reason in self.reasons if verdict is worst)
        if worst is Verdict.GOOD:
            return "good: the captions belong to their images."
        if worst is Verdict.BROKEN:
            return f"the pairing is broken: {reasons}."
        return f"cannot tell whether captions belong to their images: {reasons or 'the store does not have both'}."


def diagnose(store: Store) -> Diagnosis:
    """Examine a sample of a store's rows: each array by itself, and each caption array with each image array.

    Rows that are not committed or could not be encoded are left out.
    """
    diagnosis = Diagnosis()
    row_N = sample_rows(store.rows)
    read = {array.path: _read(array, row_N) for array in store.arrays()}
    for array in store.arrays():
        diagnosis.lines.append(f"{array.path}: {', '.join(_facts(array, *read[array.path]))}")
    for image in _last_layers(store.images()):
        image_ND, usable_N = read[image.path]
        if usable_N.sum() < 2 * MIN_TESTED:
            reason = f"{image.path} has {usable_N.sum()} usable rows, expected at least {2 * MIN_TESTED}"
            diagnosis.reasons.append((Verdict.UNKNOWN, reason))
            continue
        images = ImageMap(row_N, image_ND, usable_N)
        for text in (array for name in store.captions for array in _last_layers(store.texts(name))):
            pair, pairing = f"{text.path} with {image.path}", images.examine(*read[text.path])
            if pairing is None:
                diagnosis.reasons.append((Verdict.UNKNOWN, f"{pair}: fewer than {2 * MIN_TESTED} rows have both"))
                continue
            verdict, reason = pairing.judge(row_N // store.shard_rows)
            diagnosis.reasons.append((verdict, f"{pair}: {reason}"))
            scores = _scores(pairing)
            diagnosis.lines.append(f"{pair}: {_describe(scores)}")
            about = {"image": image.path, "text": text.path, "verdict": verdict.name.lower(), "reason": reason}
            diagnosis.scores.append({**about, **scores})
    return diagnosis


def _last_layers(arrays: Mapping[str, FeatureArray]) -> list[FeatureArray]:
    """Return the array of each network's last layer. Earlier layers show the same pairing less clearly."""
    ordered = sorted(arrays.values(), key=lambda array: array.identity.spec.layer)
    return list({array.identity.spec.network_id: array for array in ordered}.values())


def sample_rows(rows: int) -> Places:
    """Return the rows to examine, in rising order: all up to `SAMPLE_ROWS`, else evenly spaced spans of `SPAN_ROWS`."""
    if rows <= SAMPLE_ROWS:
        return np.arange(rows)
    starts = np.linspace(0, rows - SPAN_ROWS, SAMPLE_ROWS // SPAN_ROWS).astype(np.int64) // SPAN_ROWS * SPAN_ROWS
    return (np.unique(starts)[:, None] + np.arange(SPAN_ROWS)).ravel()


def _read(array: FeatureArray, row_N: Places) -> tuple[Half, Mask]:
    """Return the features (n, D) of the rows, and which of them are usable, reading one span at a time."""
    breaks = np.flatnonzero(np.diff(row_N) > 1) + 1
    parts = [array.read(int(span[0]), int(span[-1]) + 1) for span in np.split(row_N, breaks)]
    features, status = (np.concatenate(each) for each in zip(*parts, strict=True))
    return features, status == Status.OK


def _facts(array: FeatureArray, features_ND: Half, usable_N: Mask) -> Iterator[str]:
    """Yield facts about one array: the statuses of all its rows, and properties of the sample's features."""
    yield ", ".join(f"{count / array.rows:.1%} {label}" for label, count in sorted(array.counts.items()))
    usable_ND = features_ND[usable_N]
    if not len(usable_ND):
        return
    norms = np.linalg.norm(usable_ND.astype(np.float64), axis=1)
    low, middle, high = np.quantile(norms, [0, 0.5, 1])
    yield f"norms {low:.3g} to {high:.3g} (median {middle:.3g})"
    if constant := int((usable_ND == usable_ND[0]).all(axis=0).sum()):
        yield f"{constant} of {array.dim} dimensions are constant"
    # Comparing the bytes of whole rows is much faster than np.unique(axis=0).
    row_bytes = np.ascontiguousarray(usable_ND).view(np.dtype((np.void, usable_ND.itemsize * array.dim)))
    if repeated := len(usable_ND) - len(np.unique(row_bytes)):
        yield f"{repeated:,} of {len(usable_ND):,} rows repeat another row's features"


def _scores(pairing: Pairing) -> dict[str, Any]:
    wrong, error = pairing.matched.wrong
    return {
        "score": pairing.matched.score,
        "shuffled": pairing.shuffled.score,
        "best_shift": max((shift.score for shift in pairing.shifted.values()), default=0.5),
        "rows": len(pairing.matched.values),
        "wrong": wrong,
        "wrong_error": error,
    }


def _describe(scores: Mapping[str, Any]) -> str:
    text = (
        f"score {scores['score']:.2f}, shuffled {scores['shuffled']:.2f}, best shift {scores['best_shift']:.2f} "
        f"({scores['rows']:,} rows tested)"
    )
    if scores["wrong"] > NOTED:
        text += f"; up to {scores['wrong']:.0%} (± {scores['wrong_error']:.0%}) of the captions may be wrong or not "
        text += "recognisable"
    return text
