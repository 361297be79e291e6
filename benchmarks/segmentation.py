"""Measure the step from the scores of windows' patches to one label per pixel, against a literal implementation.

The baseline interpolates every window's scores to its pixels, averages over windows, interpolates to the mask's size
and takes the maximum. Each step is a float32 map of all classes. Both sides run in their own processes, by turns, and
report the increase of their peak memory. Prints medians of `--repeats` rounds, the ratio of times, and the share of
pixels that get the same label.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.segmentation import Spans, axis_matrix, label_pixels, scaled_size, spans

PATCH = 14
CASES = {
    "VOC, 500 × 375": (500, 375, 20),
    "ADE20K, 683 × 512": (683, 512, 150),
    "COCO-Stuff, 640 × 480": (640, 480, 171),
    "2048 × 1536": (2048, 1536, 171),
    "panorama, 4096 × 700": (4096, 700, 171),
}
CHECKED = 4096
"""Number of pixels, spread over the image, whose labels are compared."""


def main() -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--one", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(measured(*chosen.one)))
        return
    titles = f"{'baseline s':>12}{'ours s':>8}{'ratio':>11}{'baseline MB':>13}{'ours MB':>9}  same"
    print(f"{'image':<24}{'classes':>8}{titles}")
    for case, (*_, classes) in CASES.items():
        rounds = [[_run_in_process(side, case) for side in ("baseline", "ours")] for _ in range(chosen.repeats)]
        (base_s, ours_s), (base_mb, ours_mb) = (
            [statistics.median(turn[side][what] for turn in rounds) for side in (0, 1)]
            for what in ("seconds", "increase")
        )
        base, ours = (rounds[0][side]["labels"] for side in (0, 1))
        same = 100 * sum(a == b for a, b in zip(base, ours, strict=True)) / len(base)
        numbers = f"{base_s:>12.2f}{ours_s:>8.2f}{ours_s / base_s:>11.2f}{base_mb:>13.0f}{ours_mb:>9.0f}"
        print(f"{case:<24}{classes:>8}{numbers}  {same:.2f} %")


def measured(side: str, case: str) -> dict[str, object]:
    """Label the image of a case once. Return seconds, the increase of peak memory in MB, and a sample of labels."""
    width, height, classes = CASES[case]
    across, down = (spans(length) for length in scaled_size(width, height))
    columns, rows = (-(-(axis[0][1] - axis[0][0]) // PATCH) for axis in (across, down))
    generator = torch.Generator().manual_seed(0)
    scores_yxhwC = torch.randn(len(down), len(across), rows, columns, classes, generator=generator)
    label: Callable[[Tensor, Spans, Spans, tuple[int, int]], Tensor] = {
        "baseline": label_literally,
        "ours": label_by_axes,
    }[side]
    label(scores_yxhwC[..., :2], down, across, (64, 64))  # warm up
    before, started = _peak_memory(), time.perf_counter()
    labels = label(scores_yxhwC, down, across, (height, width)).flatten()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "increase": _peak_memory() - before,
        "labels": labels[:: len(labels) // CHECKED].tolist(),
    }


def label_by_axes(scores_yxhwC: Tensor, down: Spans, across: Spans, shape: tuple[int, int]) -> Tensor:
    """Label pixels as `sail-eval segmentation` does."""
    scores_YXC = scores_yxhwC.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return label_pixels(scores_YXC, axis_matrix(down, PATCH, shape[0]), axis_matrix(across, PATCH, shape[1]))


def label_literally(scores_yxhwC: Tensor, down: Spans, across: Spans, shape: tuple[int, int]) -> Tensor:
    """Label pixels step by step, each with full-size score maps."""
    size = (down[-1][1], across[-1][1])
    total_CHW, count_HW = torch.zeros(scores_yxhwC.shape[-1], *size), torch.zeros(size)
    for row, (top, bottom) in zip(scores_yxhwC, down, strict=True):
        for scores_hwC, (left, right) in zip(row, across, strict=True):
            h, w = bottom - top, right - left
            (y, x), framed = (-h % PATCH // 2, -w % PATCH // 2), (h + -h % PATCH, w + -w % PATCH)
            pixels_CHW = F.interpolate(scores_hwC.permute(2, 0, 1)[None], framed, mode="bilinear")[0]
            total_CHW[:, top:bottom, left:right] += pixels_CHW[:, y : y + h, x : x + w]
            count_HW[top:bottom, left:right] += 1
    return F.interpolate((total_CHW / count_HW)[None], shape, mode="bilinear")[0].argmax(dim=0)


def _run_in_process(side: str, case: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", side, case], stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
