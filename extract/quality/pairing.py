"""Whether captions belong to their images, judged from features alone.

A ridge regression from image to text is fitted on half of the rows. On the other half, the percentile of a row is the
share of other rows' captions that are less like the text predicted from its image than its own caption is: near 1 for a
caption that belongs, uniform between 0 and 1 for one that does not, whatever the encoders.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Percentiles:
    """The percentiles of the tested rows that have a caption: `values` (n,), and these rows' `places` (n,)."""

    values: Floats
    places: Places

    @property
    def score(self) -> float:
        """Their mean: 0.5 is chance, 1 is perfect."""
        return float(self.values.mean()) if len(self.values) else 0.5

    def among(self, chosen: Mask) -> "Percentiles":
        """Return those of the chosen rows."""
        return Percentiles(self.values[chosen], self.places[chosen])

    @property
    def wrong(self) -> tuple[float, float]:
        """The share of rows whose caption does not belong, and its standard error.

        Wrong captions are uniform, so a quarter of them is below 1/4, where few right ones are: Storey's estimator of
        a proportion of true null hypotheses (2002), with λ = 3/4. Right captions that the encoders cannot tell make it
        too high, so it is a bound from above.
        """
        low = float((self.values < LOW).mean())
        return min(low / LOW, 1.0), float(np.sqrt(low * (1 - low) / len(self.values))) / LOW


@dataclass(frozen=True)
class Shift:
    """What captions from so many rows further on score, and how much more than a row's own (`gain` ± `error`)."""

    score: float
    gain: float
    error: float


class ImageMap:
    """Predicts texts from the images of a sample: fitted on half of the usable rows, tested on the others.

    `row_N` are the rows' numbers in the store, rising; `image_ND` may hold NaN where `usable_N` is False.
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

    def percentiles(self, text_NE: Floats, usable_N: Mask, partner_N: Places) -> Percentiles:
        """Fit and test with the caption of row `partner_N[i]` for the image of row i; −1 stands for none.

        A fitted row without a caption counts as one with the mean caption, which shrinks the map and does not turn it.
        """
        there_N = (partner_N >= 0) & usable_N[partner_N]
        y_NE = np.where(there_N[:, None], text_NE[partner_N], 0.0)
        weight_DE = self._inverse_DD @ (self._fitted_x.T @ y_NE[self.fitted])
        chosen = there_N[self.tested]
        places = self.tested[chosen]
        predicted_TE = _unit(self._tested_x[chosen] @ weight_DE)
        own_TE = _unit(y_NE[places])
        pool_PE = own_TE[self._random.permutation(len(own_TE))[:POOL]]
        margin_TP = predicted_TE @ pool_PE.T - (predicted_TE * own_TE).sum(axis=1, keepdims=True)
        below, above = (margin_TP < -TIE).mean(axis=1), (margin_TP > TIE).mean(axis=1)
        return Percentiles((1 + below - above) / 2, places)


@dataclass(frozen=True)
class Pairing:
    """How well the captions of a sample go with their images: own, shuffled, and shifted by so many rows."""

    matched: Percentiles
    shuffled: Percentiles
    shifted: dict[int, Shift]


def examine_pairing(images: ImageMap, text_ND: Half, usable_N: Mask) -> Pairing | None:
    """Score the captions of the map's rows, each way of pairing with a map of its own; None for too few of them."""
    own_N = np.arange(len(images.row_N))
    if usable_N[images.fitted].sum() < MIN_TESTED or usable_N[images.tested].sum() < MIN_TESTED:
        return None
    text_NE = _reduced(_standardised(text_ND, images.fitted[usable_N[images.fitted]], usable_N))
    matched = images.percentiles(text_NE, usable_N, own_N)
    shuffled = images.percentiles(text_NE, usable_N, np.random.default_rng(1).permutation(own_N))
    shifted = {}
    for shift in SHIFTS:
        partner_N = _shifted(images.row_N, shift)
        scored = images.percentiles(text_NE, usable_N, partner_N)
        # Only rows whose neighbour has another image and another caption can tell the two ways of pairing apart.
        places, first, second = np.intersect1d(matched.places, scored.places, return_indices=True)
        partner = partner_N[places]
        differs = (text_ND[places] != text_ND[partner]).any(axis=1)
        differs &= (images.image_ND[places] != images.image_ND[partner]).any(axis=1)
        gain = (scored.values[second] - matched.values[first])[differs]
        if len(gain) >= MIN_TESTED:
            shifted[shift] = Shift(scored.score, float(gain.mean()), float(gain.std() / np.sqrt(len(gain))))
    return Pairing(matched, shuffled, shifted)


def _shifted(row_N: Places, shift: int) -> Places:
    """Return where in the sample the row `shift` further on is, −1 where it is not in the sample."""
    place_N = np.searchsorted(row_N, row_N + shift).clip(max=len(row_N) - 1)
    return np.where(row_N[place_N] == row_N + shift, place_N, -1)


def _standardised(features_ND: Half, fitted: Places, usable_N: Mask) -> Floats:
    """Return features with the fitted rows' mean 0 and deviation 1; 0 where unusable, or where they never vary."""
    fitted_FD = features_ND[fitted].astype(np.float64)
    mean_D, deviation_D = fitted_FD.mean(axis=0), fitted_FD.std(axis=0)
    varies_D = deviation_D > TIE * np.abs(mean_D)
    scaled_ND = (features_ND.astype(np.float64) - mean_D) / np.where(varies_D, deviation_D, np.inf)
    return np.where(usable_N[:, None], scaled_ND, 0.0)


def _reduced(text_ND: Floats) -> Floats:
    """Return the texts in about their leading `TEXT_DIM` principal directions: one step of subspace iteration."""
    dim = text_ND.shape[1]
    start_DE = np.random.default_rng(2).normal(size=(dim, min(dim, TEXT_DIM)))
    basis_DE, _ = np.linalg.qr(text_ND.T @ (text_ND @ start_DE))
    reduced_NE: Floats = text_ND @ basis_DE
    return reduced_NE


def _unit(rows_NE: Floats) -> Floats:
    length_N1 = np.linalg.norm(rows_NE, axis=1, keepdims=True)
    return rows_NE / np.where(length_N1 > 0, length_N1, 1.0)
