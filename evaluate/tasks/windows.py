"""Sliding windows over a picture, and one label a pixel from the scores of their patches.

The scores of a window's patches are spread over its pixels (bilinear), averaged where windows overlap, and brought to
the mask's size (bilinear). All three steps are linear and treat rows and columns apart, so that together they are one
matrix an axis. The picture of all scores (2 GB for 171 classes at 2048 × 1536) never exists: rows are labelled some at
a time.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.extract.encoders.preprocessing import margins

SHORT_SIDE, LONG_SIDE = 448, 2048
WINDOW, STRIDE = 448, 224
BACKGROUND_SCALE = 40.0
"""Cosines times this go into the softmax whose greatest probability is compared with a background threshold."""
BAND_NUMBERS = 1 << 23
"""At most so many scores exist at once (32 MB), unless one row alone has more: the fastest of sizes that were tried."""

Spans = tuple[tuple[int, int], ...]


def scaled_size(width: int, height: int) -> tuple[int, int]:
    """Return width and height with the short side at 448, or less where the long side would pass 2048."""
    factor = min(SHORT_SIDE / min(width, height), LONG_SIDE / max(width, height))
    return max(int(width * factor + 0.5), 1), max(int(height * factor + 0.5), 1)


def spans(side: int, window: int = WINDOW, stride: int = STRIDE) -> Spans:
    """Return first and end pixel of the windows along an axis; the last one is moved back to end with the picture."""
    count = max(-(-(side - window) // stride), 0) + 1
    ends = (min(number * stride + window, side) for number in range(count))
    return tuple((max(end - window, 0), end) for end in ends)


@lru_cache(maxsize=16)  # the pictures of a set have few sizes
def axis_matrix(windows: Spans, patch: int, target: int) -> Tensor:
    """Return how scores of patches become scores of pixels along one axis, (target, windows · patches) float32.

    Args:
        windows: The windows' spans, of equal length; the last one ends with the picture.
        patch: Pixels a patch. A window that is no multiple of it was framed by `margins`, and the frame is cut off.
        target: Pixels of the mask along this axis.
    """
    side = windows[-1][1]
    before, after = margins(windows[0][1] - windows[0][0], patch)
    parts = []
    for start, end in windows:
        framed = before + end - start + after
        part = torch.zeros(side, framed // patch, dtype=torch.float64)
        part[start:end] = _stretched(torch.eye(framed // patch, dtype=torch.float64), framed)[before:][: end - start]
        parts.append(part)
    averaged = torch.cat(parts, dim=1)
    averaged /= averaged.sum(dim=1, keepdim=True)  # a pixel's weights in one window sum to 1: this counts its windows
    return _stretched(averaged, target).float()


def label_pixels(scores_YXC: Tensor, rows_HY: Tensor, columns_WX: Tensor, threshold: float | None = None) -> Tensor:
    """Return the best class of each pixel, (H, W) uint8, on the CPU.

    Args:
        scores_YXC: Scores of the patches of all windows, as one grid of windows side by side.
        rows_HY: From patches to pixels down the picture, as `axis_matrix` gives it.
        columns_WX: The same across.
        threshold: Label a pixel C (one more than the last class) where softmax gives no class this probability.
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


def _stretched(values_LK: Tensor, length: int) -> Tensor:
    """Return values along an axis, interpolated to another length, (length, K)."""
    return F.interpolate(values_LK.T[None], size=length, mode="linear", align_corners=False)[0].T
