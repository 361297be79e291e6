"""Test from features alone whether captions belong to their images.

A ridge regression from image to text is fitted on half of the rows. On the other half, the percentile of a row is the
share of other rows' captions that are less similar to the text predicted from its image than its own caption is. It is
near 1 for a caption that belongs, and uniform between 0 and 1 for one that does not, whatever the encoders.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Half = NDArray[np.float16]
Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]

SHIFTS = tuple(shift for shift in range(-5, 6) if shift)
RIDGE = 2.0
TEXT_DIM = 128
POOL = 1_024
MIN_TESTED = 100
LOW = 0.25
TIE = 1e-9

CLEAR = 3.0
"""Standard errors that make a difference significant."""
CLEAR_SHIFT = 4.0
"""The same for the best of ten shifts."""
WRONG = 0.3
"""Share of wrong captions that, exceeded by two standard errors, makes a store broken. On stores of 250 to 3,000 photos
and drawn scenes, the estimate was below 0.13 with all captions in place and above 0.29 with half of them permuted."""
WRONG_SHARD = 0.5
"""The same for one shard."""


class Verdict(IntEnum):
    """A judgement of a pairing. Higher values are worse."""

    UNKNOWN = 0
    GOOD = 1
    BROKEN = 2


@dataclass(frozen=True)
class Percentiles:
    """The percentiles of the tested rows that have a caption.

    Attributes:
        values: The percentiles, (n,).
        places: Positions of these rows in the sample, (n,).
    """

    values: Floats
    places: Places

    @property
    def score(self) -> float:
        """Mean of the percentiles: 0.5 is chance, 1 is perfect."""
        return float(self.values.mean()) if len(self.values) else 0.5

    def among(self, chosen: Mask) -> "Percentiles":
        """Return the percentiles of the chosen rows."""
        return Percentiles(self.values[chosen], self.places[chosen])

    @property
    def wrong(self) -> tuple[float, float]:
        """Share of rows whose caption does not belong, and its standard error.

        Percentiles of wrong captions are uniform, so a quarter of them is below 1/4, where few right ones are. This is
        Storey's estimator of a proportion of true null hypotheses (2002), with λ = 3/4. Right captions that the
        encoders cannot recognise make it too high, so it is an upper bound.
        """
        low = float((self.values < LOW).mean())
        return min(low / LOW, 1.0), float(np.sqrt(low * (1 - low) / len(self.values))) / LOW


@dataclass(frozen=True)
class Shift:
    """Result of pairing each image with the caption of a row further on.

    Attributes:
        score: Mean percentile.
        gain: Mean difference to the percentile of a row's own caption.
        error: Standard error of `gain`.
    """

    score: float
    gain: float
    error: float


@dataclass(frozen=True)
class Pairing:
    """The fit of captions to the images of a sample: each row's own captions, shuffled ones, and shifted ones."""

    matched: Percentiles
    shuffled: Percentiles
    shifted: dict[int, Shift]

    def judge(self, shard_N: Places) -> tuple[Verdict, str]:
        """Return the verdict and its reason.

        Args:
            shard_N: Shard of each row of the sample.
        """
        matched, shuffled = self.matched, self.shuffled
        chance_error = 1 / np.sqrt(12 * len(matched.values))
        best = max(self.shifted, key=lambda shift: self.shifted[shift].gain, default=None)
        if best is not None:
            found = self.shifted[best]
            if found.gain > -CLEAR * found.error and found.score - 0.5 > CLEAR_SHIFT * chance_error:
                partner = f"row i {'+-'[best < 0]} {abs(best)}"
                return Verdict.BROKEN, (
                    f"the captions fit at least as well shifted by {best:+d} row{'s' * (abs(best) > 1)}: the caption "
                    f"of the image in row i is in {partner} (score {found.score:.2f}, unshifted {matched.score:.2f})"
                )
        if matched.score - shuffled.score < CLEAR * np.sqrt(2) * chance_error:
            return Verdict.BROKEN, (
                f"the captions fit no better than shuffled ones ({matched.score:.2f} and {shuffled.score:.2f}): they "
                "are mixed up or unrelated to the images"
            )
        wrong, error = matched.wrong
        if wrong - 2 * error > WRONG:
            return Verdict.BROKEN, f"about {wrong:.0%} (± {error:.0%}) of the captions do not belong to their images"
        if shards := self._wrong_shards(shard_N):
            some = ", ".join(map(str, shards[:10])) + (f" and {len(shards) - 10} more" if len(shards) > 10 else "")
            plural = "s" * (len(shards) > 1)
            return Verdict.BROKEN, f"most captions in shard{plural} {some} do not belong to their images"
        return Verdict.GOOD, "they belong together"

    def _wrong_shards(self, shard_N: Places) -> list[int]:
        """Return the shards in which clearly more than half of the captions do not belong."""
        shard_T = shard_N[self.matched.places]
        wrong = {shard: self.matched.among(shard_T == shard).wrong for shard in np.unique(shard_T).tolist()}
        return [shard for shard, (share, error) in wrong.items() if share - CLEAR * error > WRONG_SHARD]


class ImageMap:
    """A map from images to texts for a sample of rows, fitted on half of the usable rows and tested on the others.

    Args:
        row_N: Numbers of the rows in the store, in rising order.
        image_ND: Image features. They may be NaN in rows that are not usable.
        usable_N: Whether a row has usable features.
        seed: Seed of the split.
    """

    def __init__(self, row_N: Places, image_ND: Half, usable_N: Mask, seed: int = 0):
        self.row_N = row_N
        self.image_ND = image_ND
        self._random = np.random.default_rng(seed)
        shuffled = self._random.permutation(np.flatnonzero(usable_N))
        self.fitted, self.tested = np.sort(shuffled[::2]), np.sort(shuffled[1::2])
        x_ND = _standardised(image_ND, self.fitted, usable_N)
        self._fitted_x, self._tested_x = x_ND[self.fitted], x_ND[self.tested]
        gram_DD = self._fitted_x.T @ self._fitted_x
        gram_DD[np.diag_indices(len(gram_DD))] += RIDGE * len(gram_DD)
        self._inverse_DD = np.linalg.inv(gram_DD)

    def examine(self, text_ND: Half, usable_N: Mask) -> Pairing | None:
        """Score the captions of the sample, fitting each way of pairing separately.

        Returns:
            The scores, None if too few rows have a caption.
        """
        own_N = np.arange(len(self.row_N))
        if usable_N[self.fitted].sum() < MIN_TESTED or usable_N[self.tested].sum() < MIN_TESTED:
            return None
        text_NE = _reduced(_standardised(text_ND, self.fitted[usable_N[self.fitted]], usable_N))
        matched = self.percentiles(text_NE, usable_N, own_N)
        shuffled = self.percentiles(text_NE, usable_N, np.random.default_rng(1).permutation(own_N))
        shifted = {}
        for shift in SHIFTS:
            # Position in the sample of the row `shift` further on, −1 if the sample does not have it.
            partner_N = np.searchsorted(self.row_N, self.row_N + shift).clip(max=len(self.row_N) - 1)
            partner_N = np.where(self.row_N[partner_N] == self.row_N + shift, partner_N, -1)
            scored = self.percentiles(text_NE, usable_N, partner_N)
            # Only rows whose neighbour has another image and another caption distinguish the two ways of pairing.
            places, first, second = np.intersect1d(matched.places, scored.places, return_indices=True)
            partner = partner_N[places]
            differs = (text_ND[places] != text_ND[partner]).any(axis=1)
            differs &= (self.image_ND[places] != self.image_ND[partner]).any(axis=1)
            gain = (scored.values[second] - matched.values[first])[differs]
            if len(gain) >= MIN_TESTED:
                shifted[shift] = Shift(scored.score, float(gain.mean()), float(gain.std() / np.sqrt(len(gain))))
        return Pairing(matched, shuffled, shifted)

    def percentiles(self, text_NE: Floats, usable_N: Mask, partner_N: Places) -> Percentiles:
        """Fit and test with the caption of row `partner_N[i]` for the image of row i; −1 stands for none.

        A fitted row without a caption counts as one with the mean caption, which shrinks the map without turning it.
        """
        paired_N = (partner_N >= 0) & usable_N[partner_N]
        y_NE = np.where(paired_N[:, None], text_NE[partner_N], 0.0)
        weight_DE = self._inverse_DD @ (self._fitted_x.T @ y_NE[self.fitted])
        chosen = paired_N[self.tested]
        places = self.tested[chosen]
        predicted_TE = _unit(self._tested_x[chosen] @ weight_DE)
        own_TE = _unit(y_NE[places])
        pool_PE = own_TE[self._random.permutation(len(own_TE))[:POOL]]
        margin_TP = predicted_TE @ pool_PE.T - (predicted_TE * own_TE).sum(axis=1, keepdims=True)
        below, above = (margin_TP < -TIE).mean(axis=1), (margin_TP > TIE).mean(axis=1)
        return Percentiles((1 + below - above) / 2, places)


def _standardised(features_ND: Half, fitted: Places, usable_N: Mask) -> Floats:
    """Scale features to mean 0 and deviation 1 on the fitted rows; 0 if unusable, or if a dimension is constant."""
    fitted_FD = features_ND[fitted].astype(np.float64)
    mean_D, deviation_D = fitted_FD.mean(axis=0), fitted_FD.std(axis=0)
    varies_D = deviation_D > TIE * np.abs(mean_D)
    scaled_ND = (features_ND.astype(np.float64) - mean_D) / np.where(varies_D, deviation_D, np.inf)
    return np.where(usable_N[:, None], scaled_ND, 0.0)


def _reduced(text_ND: Floats) -> Floats:
    """Project texts onto about their leading `TEXT_DIM` principal directions, by one step of subspace iteration."""
    dim = text_ND.shape[1]
    start_DE = np.random.default_rng(2).normal(size=(dim, min(dim, TEXT_DIM)))
    basis_DE, _ = np.linalg.qr(text_ND.T @ (text_ND @ start_DE))
    reduced_NE: Floats = text_ND @ basis_DE
    return reduced_NE


def _unit(rows_NE: Floats) -> Floats:
    length_N1 = np.linalg.norm(rows_NE, axis=1, keepdims=True)
    return rows_NE / np.where(length_N1 > 0, length_N1, 1.0)
