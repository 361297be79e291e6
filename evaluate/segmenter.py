"""Labels of pixels from the embeddings of patches, by sliding windows.

The scores of a window's patches are interpolated to its pixels (bilinear), averaged where windows overlap, and
interpolated to the size of the mask (bilinear). All three steps are linear and treat rows and columns separately, so
together they are one matrix per axis. The full score volume (2 GB for 171 classes at 2048 × 1536) is never built: rows
are labelled in bands.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.models import RunError
from sail_align.extract.data import Sample
from sail_align.extract.encoders.preprocessing import Normalisation, margins
from sail_align.extract.errors import UserError

SHORT_SIDE, LONG_SIDE = 448, 2048
WINDOW, STRIDE = 448, 224
BACKGROUND = "background"
BACKGROUND_SCALE = 40.0
"""Factor of the cosines in the softmax whose maximum is compared with a background threshold."""
BAND_NUMBERS = 1 << 23
"""Maximum number of scores at a time (32 MB), unless one row has more. The fastest of the sizes that were tried."""
AUTHORS_NORMALISATION = Normalisation(
    mean=(122.771 / 255, 116.746 / 255, 104.094 / 255), std=(68.501 / 255, 66.632 / 255, 70.323 / 255)
)

Spans = tuple[tuple[int, int], ...]


class Segmenter:
    """Labels the pixels of a set's pictures by the protocol in its task settings.

    Raises:
        UserError: The settings have a background threshold, but no class has that name.
    """

    def __init__(self, data: EvaluationSet):
        self._data = data
        self._threshold = data.task.background
        names = data.source.classes
        background = [label for label, name in enumerate(names) if self._threshold is not None and name == BACKGROUND]
        if self._threshold is not None and not background:
            raise UserError(
                f"{data.manifest.name} has a background threshold, but no class {BACKGROUND!r}. Name one, or remove "
                "task.background."
            )
        prompted = [label for label in range(len(names)) if label not in background]
        self._label_of = np.array(prompted + background, dtype=np.uint8)
        self._classes_CE = torch.from_numpy(data.class_embeddings())[prompted].to(data.encoders.device)

    @torch.inference_mode()
    def label(self, sample: Sample, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return the class of each pixel of a picture.

        Args:
            sample: The picture and its mask.
            shape: Size (H, W) of the mask, and of the result.

        Raises:
            UserError: Picture and mask have different aspect ratios.
            RunError: The scores are not finite.
        """
        encoder, variants = self._data.encoders.image, self._data.task.variants
        image = self._data.source.image(sample.image)
        if abs(image.width * shape[0] - image.height * shape[1]) > sum(image.size):  # more than rounding of the sides
            raise UserError(
                f"Mask {sample.mask!r} of {self._data.manifest.name} has {shape[1]} × {shape[0]} pixels, but its "
                f"picture {image.width} × {image.height} after its EXIF rotation. Correct the wrong file."
            )
        width, height = scaled_size(*image.size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels_HWC = torch.from_numpy(np.array(resized.convert("RGB")))
        in_one_piece = "whole-image" in variants
        down, across = (spans(side, side if in_one_piece else WINDOW) for side in (height, width))
        patches_NhwD = encoder.encode_dense(
            torch.stack([pixels_HWC[top:bottom, left:right] for top, bottom in down for left, right in across]),
            normalisation=AUTHORS_NORMALISATION if "authors-normalisation" in variants else None,
            last_attention="maskclip" not in variants,
        )
        scores_NhwC = self._data.run.model.encode_image(patches_NhwD.to(self._classes_CE.device)) @ self._classes_CE.T
        if not scores_NhwC.isfinite().all():
            raise RunError.diverged(self._data.run)
        grid_yxhwC = scores_NhwC.reshape(len(down), len(across), *scores_NhwC.shape[1:])
        scores_YXC = grid_yxhwC.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        axes = ((down, shape[0]), (across, shape[1]))
        rows_HY, columns_WX = (axis_matrix(windows, encoder.stride, side).to(scores_YXC) for windows, side in axes)
        labels_HW = label_pixels(scores_YXC, rows_HY, columns_WX, self._threshold)
        labels: NDArray[np.uint8] = self._label_of[labels_HW.numpy()]
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
    """Return the best class of each pixel, (H, W) uint8, on the CPU.

    Args:
        scores_YXC: Scores of the patches of all windows, as one grid of windows side by side.
        rows_HY: Map from patches to pixels along the height, from `axis_matrix`.
        columns_WX: The same along the width.
        threshold: Pixels where no class has this softmax probability get label C, one more than the last class.
    """
    width, classes = len(columns_WX), scores_YXC.shape[-1]
    band = max(BAND_NUMBERS // (width * classes), 1)
    labels = []
    for rows_bY in torch.split(rows_HY, band):
        across_bXC = (rows_bY @ scores_YXC.flatten(1)).reshape(-1, *scores_YXC.shape[1:])
        scores_bWC = columns_WX @ across_bXC
        best_bW, label_bW = scores_bWC.max(dim=-1)
        if threshold is not None:
            log_sum_bW = (BACKGROUND_SCALE * scores_bWC).logsumexp(dim=-1)
            label_bW[(BACKGROUND_SCALE * best_bW - log_sum_bW).exp() < threshold] = classes
        labels.append(label_bW.to(torch.uint8).cpu())
    return torch.cat(labels)


def _interpolate(values_LK: Tensor, length: int) -> Tensor:
    """Return values along an axis, interpolated to another length, (length, K)."""
    return F.interpolate(values_LK.T[None], size=length, mode="linear", align_corners=False)[0].T
