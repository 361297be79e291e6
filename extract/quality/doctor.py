"""Do the captions of a store belong to its images, and do its features look like features? From the store alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.data import Status
from sail_align.extract.quality.pairing import MIN_TESTED, Half, ImageMap, Mask, Pairing, Places, examine_pairing
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store

SAMPLE_ROWS = 16_384
SPAN_ROWS = 128
CLEAR = 3.0
"""How many standard errors make a difference."""
CLEAR_SHIFT = 4.0
"""The same for the best of ten shifts."""
WRONG = 0.3
"""A share of wrong captions that is above this by two standard errors breaks a store. Measured there on stores of
250 to 3,000 photos and drawn scenes: below 0.13 with all captions in place, above 0.29 with half of them permuted."""
WRONG_SHARD = 0.5
NOTED = 0.1


class Verdict(IntEnum):
    """The worse, the higher."""

    UNTOLD = 0
    GOOD = 1
    BROKEN = 2


@dataclass
class Diagnosis:
    """What was found: `lines` for a reader, and for each pair of arrays a verdict with its reason."""

    lines: list[str] = field(default_factory=list)
    reasons: list[tuple[Verdict, str]] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of all pairs of arrays; untold where there is none."""
        return max((verdict for verdict, _ in self.reasons), default=Verdict.UNTOLD)

    @property
    def sentence(self) -> str:
        """The verdict in a sentence, with the reasons for it."""
        worst = self.verdict
        reasons = "; ".join(reason for verdict, reason in self.reasons if verdict is worst)
        if worst is Verdict.GOOD:
            return "good: the captions belong to their images."
        if worst is Verdict.BROKEN:
            return f"the pairing is broken: {reasons}."
        return f"cannot tell whether captions belong to their images: {reasons or 'there are not both of them'}."


def diagnose(store: Store) -> Diagnosis:
    """Examine a sample of a store's rows: each array by itself, and each caption array with each image array.

    The sample is all rows up to `SAMPLE_ROWS`, and else stretches of `SPAN_ROWS` from the whole length of the store.
    Rows that are not committed or could not be encoded are left out.
    """
    diagnosis = Diagnosis()
    row_N = sample_rows(store.rows)
    read = {array.path: _read(array, row_N) for array in store.arrays()}
    for array in store.arrays():
        diagnosis.lines.append(f"{array.path}: {', '.join(_facts(array, *read[array.path]))}")
    for image in store.images().values():
        image_ND, usable_N = read[image.path]
        if usable_N.sum() < 2 * MIN_TESTED:
            few = f"{image.path} has {usable_N.sum()} rows, and it takes {2 * MIN_TESTED}"
            diagnosis.reasons.append((Verdict.UNTOLD, few))
            continue
        images = ImageMap(row_N, image_ND, usable_N)
        for text in (array for name in store.captions for array in store.texts(name).values()):
            pairing = examine_pairing(images, *read[text.path])
            verdict, reason = judge(pairing, row_N // store.shard_rows)
            diagnosis.reasons.append((verdict, f"{text.path} with {image.path}: {reason}"))
            if pairing:
                diagnosis.lines.append(f"{text.path} with {image.path}: {_scores(pairing)}")
    return diagnosis


def diagnose_complete(store: Store) -> Diagnosis | None:
    """Return the diagnosis of a store once it is complete and has images and captions, else None."""
    both = store.images() and any(store.texts(name) for name in store.captions)
    return diagnose(store) if both and all(array.complete for array in store.arrays()) else None


def judge(pairing: Pairing | None, shard_N: Places) -> tuple[Verdict, str]:
    """Return the verdict on one pair of arrays and the reason, given the shard of each row of the sample."""
    if pairing is None:
        return Verdict.UNTOLD, f"fewer than {2 * MIN_TESTED} rows have both"
    matched, shuffled = pairing.matched, pairing.shuffled
    chance_error = 1 / np.sqrt(12 * len(matched.values))
    best = max(pairing.shifted, key=lambda shift: pairing.shifted[shift].gain, default=None)
    if best is not None:
        found = pairing.shifted[best]
        if found.gain > -CLEAR * found.error and found.score - 0.5 > CLEAR_SHIFT * chance_error:
            there = f"row i {'+-'[best < 0]} {abs(best)}"
            return Verdict.BROKEN, (
                f"the captions fit better, or as well, shifted by {best:+d} row{'s' * (abs(best) > 1)}: what belongs "
                f"to the image of row i is in {there} (score {found.score:.2f}, unshifted {matched.score:.2f})"
            )
    if matched.score - shuffled.score < CLEAR * np.sqrt(2) * chance_error:
        return Verdict.BROKEN, (
            f"the captions fit no better than shuffled ones ({matched.score:.2f} and {shuffled.score:.2f}): they "
            "are mixed up, or say nothing about the images"
        )
    wrong, error = matched.wrong
    if wrong - 2 * error > WRONG:
        return Verdict.BROKEN, f"about {wrong:.0%} (± {error:.0%}) of the captions do not belong to their images"
    if shards := list(_wrong_shards(pairing, shard_N)):
        some = ", ".join(map(str, shards[:10])) + (f" and {len(shards) - 10} more" if len(shards) > 10 else "")
        return Verdict.BROKEN, f"most captions in shard{'s' * (len(shards) > 1)} {some} do not belong to their images"
    return Verdict.GOOD, "they belong together"


def sample_rows(rows: int) -> Places:
    """Return the numbers of the rows to look at, rising: stretches evenly over the store, or all of a small one."""
    if rows <= SAMPLE_ROWS:
        return np.arange(rows)
    starts = np.linspace(0, rows - SPAN_ROWS, SAMPLE_ROWS // SPAN_ROWS).astype(np.int64) // SPAN_ROWS * SPAN_ROWS
    return (np.unique(starts)[:, None] + np.arange(SPAN_ROWS)).ravel()


def _read(array: FeatureArray, row_N: Places) -> tuple[Half, Mask]:
    """Return the features (n, D) of the rows and which of them are usable, read a stretch at a time."""
    breaks = np.flatnonzero(np.diff(row_N) > 1) + 1
    parts = [array.read(int(span[0]), int(span[-1]) + 1) for span in np.split(row_N, breaks)]
    features, status = (np.concatenate(each) for each in zip(*parts, strict=True))
    return features, status == Status.OK


def _facts(array: FeatureArray, features_ND: Half, usable_N: Mask) -> Iterator[str]:
    """Yield what is worth knowing about one array: the statuses of all its rows, the rest from the sample."""
    yield ", ".join(f"{count / array.rows:.1%} {label}" for label, count in sorted(array.counts.items()))
    there_ND = features_ND[usable_N]
    if not len(there_ND):
        return
    norms = np.linalg.norm(there_ND.astype(np.float64), axis=1)
    low, middle, high = np.quantile(norms, [0, 0.5, 1])
    yield f"norms {low:.3g} to {high:.3g} (median {middle:.3g})"
    if constant := int((there_ND == there_ND[0]).all(axis=0).sum()):
        yield f"{constant} of {array.dim} dimensions never vary"
    if repeated := len(there_ND) - len(np.unique(_as_bytes(there_ND))):
        yield f"{repeated:,} of {len(there_ND):,} rows repeat another's features"


def _as_bytes(features_ND: Half) -> NDArray[np.void]:
    rows = np.ascontiguousarray(features_ND)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()


def _scores(pairing: Pairing) -> str:
    wrong, error = pairing.matched.wrong
    text = (
        f"score {pairing.matched.score:.2f}, shuffled {pairing.shuffled.score:.2f}, best shift "
        f"{max((shift.score for shift in pairing.shifted.values()), default=0.5):.2f} "
        f"({len(pairing.matched.values):,} rows tested)"
    )
    if wrong > NOTED:
        text += f"; up to {wrong:.0%} (± {error:.0%}) of the captions may not belong, or cannot be told to"
    return text


def _wrong_shards(pairing: Pairing, shard_N: Places) -> Iterator[int]:
    """Yield the shards where clearly more than half of the captions do not belong."""
    matched = pairing.matched
    shards: Sequence[int] = np.unique(shard_N[matched.places]).tolist()
    for shard in shards:
        wrong, error = matched.among(shard_N[matched.places] == shard).wrong
        if wrong - CLEAR * error > WRONG_SHARD:
            yield shard
