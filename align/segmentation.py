"""Labels of pixels from the embeddings of patches, by sliding windows.

The scores of a window's patches are interpolated to its pixels (bilinear), averaged where windows overlap, and
interpolated to the size of the mask (bilinear). All three steps are linear and treat rows and columns separately, so
together they are one matrix per axis. The full score volume (2 GB for 171 classes at 2048 × 1536) is never built: rows
are labelled in bands.
"""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.preprocessing import Normalisation, margins
from sail_align.extract.encoders.vision import VisionEncoder

SHORT_SIDE, LONG_SIDE = 448, 2048
WINDOW, STRIDE = 448, 224
BACKGROUND = "background"
BACKGROUND_SCALE = 40.0
"""Factor of the cosines in the softmax whose maximum is compared with a background threshold."""
VARIANTS = ("whole-image", "maskclip", "authors-normalisation")
"""Departures from the protocol: see `evaluate.tasks.segmentation`."""
BAND_NUMBERS = 1 << 23
"""Maximum number of scores at a time (32 MB), unless one row has more. The fastest of the sizes that were tried."""
AUTHORS_NORMALISATION = Normalisation(
    mean=(122.771 / 255, 116.746 / 255, 104.094 / 255), std=(68.501 / 255, 66.632 / 255, 70.323 / 255)
)

Spans = tuple[tuple[int, int], ...]


class Segmentation(NamedTuple):
    """The label of each pixel of an image.

    Attributes:
        labels: Positions in `names`, (H, W): uint8 for at most 256 names, else int32.
        names: Names of the labels.
    """

    labels: NDArray[np.integer]
    names: list[str]


class ImageSegmenter:
    """Labels the pixels of images.

    Args:
        names: Names of the classes.
        classes_CE: Embeddings of the classes.
        encoder: The image encoder.
        embed: Maps dense features (N, h, w, D) to embeddings (N, h, w, E).
        threshold: Pixels where no class has this softmax probability are background. The class with this name is then
            not compared with patches.
        variants: Departures from the protocol, of `VARIANTS`.

    Raises:
        ValueError: There is a background threshold, but no class has that name.
    """

    def __init__(
        self,
        names: Sequence[str],
        classes_CE: Tensor,
        encoder: VisionEncoder,
        embed: Callable[[Tensor], Tensor],
        *,
        threshold: float | None = None,
        variants: Collection[str] = (),
    ):
        background = [label for label, name in enumerate(names) if threshold is not None and name == BACKGROUND]
        if threshold is not None and not background:
            raise ValueError(f"There is a background threshold, but no class {BACKGROUND!r}.")
        prompted = [label for label in range(len(names)) if label not in background]
        self._label_of = np.array(prompted + background, dtype=np.uint8 if len(names) <= 256 else np.int32)
        self._classes_CE = classes_CE[prompted]
        self._encoder, self._embed, self._threshold, self._variants = encoder, embed, threshold, variants

    @torch.inference_mode()
    def label(self, image: Image.Image, shape: tuple[int, ...]) -> NDArray[np.integer]:
        """Return the class of each pixel of an image.

        Args:
            image: An upright RGB image.
            shape: Size (H, W) of the result, with the aspect ratio of the image.

        Returns:
            Labels (H, W), uint8 for at most 256 classes, else int32.

        Raises:
            FloatingPointError: The scores are not finite.
        """
        width, height = scaled_size(*image.size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels_HWC = torch.from_numpy(np.array(resized.convert("RGB")))
        in_one_piece = "whole-image" in self._variants
        down, across = (spans(side, side if in_one_piece else WINDOW) for side in (height, width))
        patches_NhwD = self._encoder.encode_dense(
            torch.stack([pixels_HWC[top:bottom, left:right] for top, bottom in down for left, right in across]),
            normalisation=AUTHORS_NORMALISATION if "authors-normalisation" in self._variants else None,
            last_attention="maskclip" not in self._variants,
        )
        scores_NhwC = self._embed(patches_NhwD.to(self._classes_CE.device)) @ self._classes_CE.T
        if not scores_NhwC.isfinite().all():
            raise FloatingPointError("The scores of patches contain NaN or infinity.")
        grid_yxhwC = scores_NhwC.reshape(len(down), len(across), *scores_NhwC.shape[1:])
        scores_YXC = grid_yxhwC.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        axes = ((down, shape[0]), (across, shape[1]))
        rows_HY, columns_WX = (axis_matrix(each, self._encoder.stride, side).to(scores_YXC) for each, side in axes)
        labels_HW = label_pixels(scores_YXC, rows_HY, columns_WX, self._threshold)
        labels: NDArray[np.integer] = self._label_of[labels_HW.numpy()]
        return labels


def scaled_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height with a short side of 448, or less where the long side would exceed 2048."""
    factor = min(SHORT_SIDE / min(width, height), LONG_SIDE / max(width, height))
    return max(int(width * factor + 0.5), 1), max(int(height * factor + 0.5), 1)


def spans(side: int, window: int = WINDOW) -> Spans:
    """Return first and end pixel of the windows along an axis. The last one is moved back to end with the picture."""
    count = max(-(-(side - window) // STRIDE), 0) + 1
    ends = (min(number * STRIDE + window, side) for number in range(count))
    return tuple((max(end - window, 0), end) for end in ends)


@lru_cache(maxsize=16)  # the pictures of a set have few sizes
def axis_matrix(windows: Spans, patch: int, target: int) -> Tensor:
    """Return the map from scores of patches to scores of pixels along one axis, (target, windows · patches) float32.

    Args:
        windows: Spans of the windows, of equal length. The last one ends with the picture.
        patch: Pixels per patch. A window that is not a multiple of it was padded by `margins`. The padding is cut off.
        target: Pixels of the mask along this axis.
    """
    side = windows[-1][1]
    before, after = margins(windows[0][1] - windows[0][0], patch)
    parts = []
    for start, end in windows:
        padded = before + end - start + after
        part = torch.zeros(side, padded // patch, dtype=torch.float64)
        part[start:end] = _interpolate(torch.eye(padded // patch, dtype=torch.float64), padded)[before:][: end - start]
        parts.append(part)
    averaged = torch.cat(parts, dim=1)
    averaged /= averaged.sum(dim=1, keepdim=True)  # a pixel's weights in one window sum to 1: this counts its windows
    return _interpolate(averaged, target).float()


def label_pixels(scores_YXC: Tensor, rows_HY: Tensor, columns_WX: Tensor, threshold: float | None = None) -> Tensor:
    """Return the best class of each pixel, (H, W), on the CPU: uint8, or int32 for more than 255 classes.

    Args:
        scores_YXC: Scores of the patches of all windows, as one grid of windows side by side.
        rows_HY: Map from patches to pixels along the height, from `axis_matrix`.
        columns_WX: The same along the width.
        threshold: Pixels where no class has this softmax probability get label C, one more than the last class.
    """
    width, classes = len(columns_WX), scores_YXC.shape[-1]
    dtype = torch.uint8 if classes <= 255 else torch.int32
    band = max(BAND_NUMBERS // (width * classes), 1)
    labels = []
    for rows_bY in torch.split(rows_HY, band):
        across_bXC = (rows_bY @ scores_YXC.flatten(1)).reshape(-1, *scores_YXC.shape[1:])
        scores_bWC = columns_WX @ across_bXC
        best_bW, label_bW = scores_bWC.max(dim=-1)
        if threshold is not None:
            log_sum_bW = (BACKGROUND_SCALE * scores_bWC).logsumexp(dim=-1)
            label_bW[(BACKGROUND_SCALE * best_bW - log_sum_bW).exp() < threshold] = classes
        labels.append(label_bW.to(dtype).cpu())
    return torch.cat(labels)


def _interpolate(values_LK: Tensor, length: int) -> Tensor:
    """Return values along an axis, interpolated to another length, (length, K)."""
    return F.interpolate(values_LK.T[None], size=length, mode="linear", align_corners=False)[0].T
