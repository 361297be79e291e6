"""Sliding windows against the protocol as one would write it down: full-size pictures of scores, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segmentation_reference import assert_labels_agree, reference_scores

from sail_align.align import segmentation
from sail_align.align.segmentation import axis_matrix, label_pixels, scaled_size, spans
from sail_align.evaluate.segmenter import Segmenter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "patch", "target"),
    [
        ((448, 597), 14, (600, 800)),  # one window down, two across
        ((597, 448), 32, (400, 300)),  # a mask smaller than what the network sees
        ((448, 448), 16, (448, 448)),
        ((300, 2048), 14, (97, 661)),  # a panorama: its windows are 300 high and get a frame
        ((500, 700), 14, (333, 500)),  # windows in both directions, as no picture of this protocol has them
    ],
)
def test_axis_matrices_equal_the_protocol(size, patch, target, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    down, across = (spans(side) for side in size)
    h, w = (-(-(axis[0][1] - axis[0][0]) // patch) for axis in (down, across))
    scores = {(top, left): torch.randn(h, w, 7, generator=generator) for top, _ in down for left, _ in across}
    grid = torch.cat([torch.cat([scores[top, left] for left, _ in across], dim=1) for top, _ in down])
    expected = reference_scores(*size, target, patch, lambda y, x, h, w: scores[y, x].permute(2, 0, 1))
    matrices = (axis_matrix(down, patch, target[0]), axis_matrix(across, patch, target[1]))
    labels = label_pixels(grid, *matrices)
    assert labels.shape == target
    assert_labels_agree(labels, expected)

    threshold = 0.9
    unsure = (expected * segmentation.BACKGROUND_SCALE).softmax(dim=0).amax(dim=0) < threshold
    assert 0.02 < unsure.float().mean() < 0.98
    with_background = label_pixels(grid, *matrices, threshold)
    assert ((with_background == 7) == unsure).float().mean() > 0.999
    assert torch.equal(with_background[with_background < 7], labels[with_background < 7])

    monkeypatch.setattr(segmentation, "BAND_NUMBERS", 5000)  # other bands, the same labels
    assert (label_pixels(grid, *matrices) == labels).float().mean() > 0.999


def test_windows_end_at_the_picture_edge():
    assert spans(448) == ((0, 448),)
    assert spans(300) == ((0, 300),)
    assert spans(449) == ((0, 448), (1, 449))
    assert spans(672) == ((0, 448), (224, 672))
    assert spans(700) == ((0, 448), (224, 672), (252, 700))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (597, 448)), ((480, 640), (448, 597)), ((100, 100), (448, 448)), ((4000, 400), (2048, 205))],
)
def test_scaled_size(size, expected):
    assert scaled_size(*size) == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", [(90, 61), (40, 130), (330, 33)])
def test_labels_equal_a_plain_implementation(world, size, tmp_path):
    """From the file to the labels: resizing, windows, frames, embedding, cosines, all of it once more."""
    generator = np.random.default_rng(1)
    manifest = world.halves("seg", [("red", "green")], {"kind": "segmentation", "templates": ["{}", "{} red"]})
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "seg" / "images" / "000.png")
    data = world.open(manifest)
    labels = torch.from_numpy(Segmenter(data).label(data.samples[0], size[::-1]))

    image = Image.open(tmp_path / "seg" / "images" / "000.png")
    factor = min(448 / min(size), 2048 / max(size))
    width, height = (int(side * factor + 0.5) for side in size)
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR))).double()
    classes_CE = torch.from_numpy(data.class_embeddings()).double()

    def scores_of_window(y, x, h, w):
        framed = F.pad((pixels[y : y + h, x : x + w] / 127.5 - 1).permute(2, 0, 1), (0, 0, *_split(-h % 4)))
        framed = F.pad(framed, _split(-w % 4))
        patches_3hw = F.normalize(F.avg_pool2d(framed, 4), dim=0)
        return torch.einsum("ce,ehw->chw", classes_CE, patches_3hw)

    assert_labels_agree(labels, reference_scores(height, width, size[::-1], 4, scores_of_window))


def _split(missing):
    return missing // 2, missing - missing // 2
