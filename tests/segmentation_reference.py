"""The protocol of segmentation as one would write it down: full-size pictures of scores, in float64."""

import torch
import torch.nn.functional as F


def reference_scores(height, width, target, patch, scores_of_window, window=448, stride=224):
    """Loop over windows, add their bilinear scores up, divide by the count, and resize: (C, H, W) float64."""
    total, count = None, torch.zeros(height, width, dtype=torch.float64)
    top = 0
    while True:
        bottom = min(top + window, height)
        left = 0
        while True:
            right = min(left + window, width)
            y, x = max(bottom - window, 0), max(right - window, 0)
            h, w = bottom - y, right - x
            pad_y, pad_x = (patch - h % patch) % patch, (patch - w % patch) % patch
            scores_Chw = scores_of_window(y, x, h, w)
            full = F.interpolate(scores_Chw[None].double(), (h + pad_y, w + pad_x), mode="bilinear")[0]
            full = full[:, pad_y // 2 : pad_y // 2 + h, pad_x // 2 : pad_x // 2 + w]
            if total is None:
                total = torch.zeros(len(full), height, width, dtype=torch.float64)
            total[:, y:bottom, x:right] += full
            count[y:bottom, x:right] += 1
            if right == width:
                break
            left += stride
        if bottom == height:
            break
        top += stride
    return F.interpolate((total / count)[None], target, mode="bilinear")[0]


def assert_labels_agree(ours_HW, scores_CHW):
    """Equal, but where the reference itself is undecided between two classes by less than float32 can tell."""
    best = scores_CHW.topk(2, dim=0)
    decided = best.values[0] - best.values[1] > 1e-5
    assert decided.float().mean() > 0.99
    assert torch.equal(ours_HW[decided].long(), best.indices[0][decided])
