"""Zero-shot segmentation: each pixel takes the class whose prompts are closest to the patches around it.

The protocol of the paper's tables: the picture's short side at 448 (its long side at 2048 at most), windows of 448
every 224 pixels, each patch through the image head (paired with its window's class token where the encoder's pooling
is `cls+mean`), cosine with the class embeddings, bilinear to the window, the mean over overlaps, bilinear to the
mask's size, argmax; mIoU over the confusion matrix of all images. Pixels of no class are ignored, and there is no class
for the background unless the task sets a threshold for it.

Variants have protocol ids of their own: `whole-image` reads the picture in one piece, `maskclip` lets patches skip the
last attention, `authors-normalisation` feeds CLIP's mean and deviation to whatever encoder, as the authors' code does.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.models import RunError
from sail_align.evaluate.results.metric import Example, Measure, Note, Outcomes, Picture, Result, summarise
from sail_align.evaluate.tasks.base import Protocol, classes_part, templates_part
from sail_align.evaluate.tasks.metrics import chance_mean_iou, confusion_matrix, iou_per_class, mean_iou
from sail_align.evaluate.tasks.overlay import class_colours, overlay
from sail_align.evaluate.tasks.windows import STRIDE, WINDOW, axis_matrix, label_pixels, scaled_size, spans
from sail_align.extract.data import IGNORED, Sample
from sail_align.extract.encoders.catalogue import Normalisation
from sail_align.extract.encoders.preprocessing import to_pixels
from sail_align.extract.errors import UserError
from sail_align.extract.system.progress import progress

Counts = NDArray[np.int64]
Labels = NDArray[np.uint8]

AUTHORS_NORMALISATION = Normalisation(
    mean=(122.771 / 255, 116.746 / 255, 104.094 / 255), std=(68.501 / 255, 66.632 / 255, 70.323 / 255)
)
BACKGROUND = "background"
SHOWN, CANDIDATES, SHOWN_SIDE = 5, 64, 512
"""The report shows so many pictures, from the worst to the best of so many that are spread over the set."""


def evaluate(data: EvaluationSet) -> Result:
    """Score mIoU and pixel accuracy."""
    samples, segmenter = data.samples, _Segmenter(data)
    places = set(np.linspace(0, len(samples) - 1, min(CANDIDATES, len(samples))).astype(int).tolist())
    counts, candidates, masks = [], [], hashlib.sha256()
    with progress(len(samples), f"{data.manifest.name} patches", unit="image", quiet=data.quiet) as bar:
        for row, sample in enumerate(samples):
            truth = _mask(data, sample)
            masks.update(repr(truth.shape).encode() + truth.tobytes())
            predicted = segmenter.label(sample, truth.shape)
            counts.append(_counts(data, sample, truth, predicted))
            if row in places and counts[-1][1].any():
                candidates.append(_Segmented.of(sample, truth, predicted, counts[-1]))
            bar.update(1)
    counts_N3C = np.stack(counts)
    hits_C, truth_C, predicted_C = counts_N3C.sum(axis=0)
    if not truth_C.any():
        raise UserError(f"No mask of {data.manifest.name} has a pixel of a listed class; correct 'classes' or 'masks'.")
    names, iou_C = data.source.classes, iou_per_class(hits_C, truth_C, predicted_C)
    there = np.flatnonzero(truth_C)
    details = {
        "iou": {names[label]: 100 * float(iou_C[label]) for label in there},
        "most_frequent_class": {
            "name": names[int(truth_C.argmax())],
            "miou": 100 * float(truth_C.max() / truth_C.sum()) / len(there),
            "pixel_accuracy": 100 * float(truth_C.max() / truth_C.sum()),
        },
    }
    outcomes = dict(zip(("hits", "truth", "predicted"), counts_N3C.transpose(1, 0, 2), strict=True))
    examples = tuple(_example(data, chosen) for chosen in _spread(candidates))
    metrics = summarise(measures(outcomes), len(samples))
    return Result(len(samples), metrics, examples, outcomes, details, masks.hexdigest())


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of pixels `hits`, `truth` and `predicted` by image and class, (N, C)."""
    hits_NC, truth_NC, predicted_NC = (outcomes[name].astype(np.float64) for name in ("hits", "truth", "predicted"))
    right_N, pixels_N = hits_NC.sum(axis=1), truth_NC.sum(axis=1)

    def miou(drawn_N: NDArray[np.float64]) -> float:
        return mean_iou(drawn_N @ hits_NC, drawn_N @ truth_NC, drawn_N @ predicted_NC)

    def accuracy(drawn_N: NDArray[np.float64]) -> float:
        pixels = drawn_N @ pixels_N
        return float(drawn_N @ right_N / pixels) if pixels else float("nan")

    return (
        Measure("miou", "mIoU", chance_mean_iou(truth_NC.sum(axis=0)), miou),
        Measure("pixel_accuracy", "pixel accuracy", 1 / truth_NC.shape[1], accuracy),
    )


class _Segmenter:
    """Labels the pixels of a set's pictures by the protocol that its task names."""

    def __init__(self, data: EvaluationSet):
        self._data = data
        self._threshold = data.task.background
        names = data.source.classes
        background = [label for label, name in enumerate(names) if self._threshold is not None and name == BACKGROUND]
        if self._threshold is not None and not background:
            raise UserError(
                f"{data.manifest.name} has a background threshold, but no class {BACKGROUND!r}; name one, or leave "
                "task.background out."
            )
        prompted = [label for label in range(len(names)) if label not in background]
        self._label_of = np.array(prompted + background, dtype=np.uint8)
        self._classes_CE = torch.from_numpy(data.class_embeddings())[prompted].to(data.encoders.device)

    @torch.inference_mode()
    def label(self, sample: Sample, shape: tuple[int, ...]) -> Labels:
        """Return the class of each pixel of a picture, `shape` (H, W)."""
        encoder, variants = self._data.encoders.image, self._data.task.variants
        image = self._data.source.image(sample.image)
        if abs(image.width * shape[0] - image.height * shape[1]) > sum(image.size):  # more than sides that were rounded
            raise UserError(
                f"Mask {sample.mask!r} of {self._data.manifest.name} has {shape[1]} × {shape[0]} pixels, its picture "
                f"{image.width} × {image.height} once it is turned as its EXIF data say; mend the one that is wrong."
            )
        width, height = scaled_size(*image.size)
        pixels_HWC = to_pixels(image.resize((width, height), Image.Resampling.BILINEAR))
        if "whole-image" in variants:
            down, across = spans(height, window=height), spans(width, window=width)
        else:
            down, across = spans(height), spans(width)
        patches_NhwD = encoder.encode_dense(
            torch.stack([pixels_HWC[top:bottom, left:right] for top, bottom in down for left, right in across]),
            normalisation=AUTHORS_NORMALISATION if "authors-normalisation" in variants else None,
            last_attention="maskclip" not in variants,
        )
        scores_NhwC = self._data.run.model.encode_image(patches_NhwD.to(self._classes_CE.device)) @ self._classes_CE.T
        if not scores_NhwC.isfinite().all():
            raise RunError(f"The heads of {self._data.run.path} give NaN or infinity; its training has diverged.")
        grid_yxhwC = scores_NhwC.reshape(len(down), len(across), *scores_NhwC.shape[1:])
        scores_YXC = grid_yxhwC.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        axes = ((down, shape[0]), (across, shape[1]))
        rows_HY, columns_WX = (axis_matrix(windows, encoder.stride, side).to(scores_YXC) for windows, side in axes)
        labels_HW = label_pixels(scores_YXC, rows_HY, columns_WX, self._threshold)
        labels: Labels = self._label_of[labels_HW.numpy()]
        return labels


def _mask(data: EvaluationSet, sample: Sample) -> Labels:
    try:
        return data.source.mask(sample.mask)
    except (OSError, SyntaxError, ValueError) as problem:  # Pillow's ways to report broken bytes
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} cannot be read ({problem}).") from problem


def _counts(data: EvaluationSet, sample: Sample, truth: Labels, predicted: Labels) -> Counts:
    """Return pixels right, true and predicted by class, (3, C)."""
    try:
        confusion_CC = confusion_matrix(truth, predicted, len(data.source.classes))
    except ValueError as problem:
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} holds a {problem}.") from problem
    return np.stack([np.diagonal(confusion_CC), confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)])


@dataclass(frozen=True)
class _Segmented:
    """What a report may show of a picture: its labels, thinned out to at most `SHOWN_SIDE`, and its counts (3, C)."""

    sample: Sample
    truth: Labels
    predicted: Labels
    counts: Counts

    @classmethod
    def of(cls, sample: Sample, truth: Labels, predicted: Labels, counts_3C: Counts) -> "_Segmented":
        step = -(-max(truth.shape) // SHOWN_SIDE)
        return cls(sample, truth[::step, ::step].copy(), predicted[::step, ::step].copy(), counts_3C)

    @property
    def accuracy(self) -> float:
        hits_C, truth_C, _ = self.counts
        return float(hits_C.sum() / truth_C.sum())


def _spread(candidates: list[_Segmented]) -> list[_Segmented]:
    """Return up to five of the candidates, from the best to the worst by pixel accuracy."""
    order = sorted(candidates, key=lambda candidate: candidate.accuracy)
    positions = np.linspace(len(order) - 1, 0, min(SHOWN, len(order))).astype(int)
    return [order[position] for position in positions]


def _example(data: EvaluationSet, segmented: _Segmented) -> Example:
    image, names = data.source.image(segmented.sample.image), data.source.classes
    truth, predicted = segmented.truth, segmented.predicted
    _, truth_C, predicted_C = segmented.counts
    colours = class_colours(truth_C, predicted_C)
    there = ", ".join(names[label] for label in np.flatnonzero(truth_C))
    legend = tuple(Note(names[label], colour=f"rgb{colour}") for label, colour in colours.items())
    counted = np.where(truth == IGNORED, IGNORED, predicted)
    guesses = "predicted classes: " + ", ".join(names[label] for label in colours if predicted_C[label])
    pictures = [
        Picture(image, alt=f"photo with {there}", caption="image"),
        Picture(overlay(image, truth, colours), alt=f"true classes: {there}", caption="truth"),
        Picture(overlay(image, counted, colours), alt=guesses, caption="prediction where it counts"),
    ]
    if (truth == IGNORED).any():
        everywhere = overlay(image, predicted, colours)
        pictures.append(Picture(everywhere, alt=f"{guesses}, and those around", caption="prediction everywhere"))
    return Example(f"pixel accuracy {100 * segmented.accuracy:.1f}", None, tuple(pictures), legend)


def _parts(data: EvaluationSet) -> list[str]:
    """Return what decides a set's numbers besides the rule."""
    variants, background = data.task.variants, data.task.background
    parts = [f"windows={'none' if 'whole-image' in variants else f'{WINDOW}-by-{STRIDE}'}"]
    parts += ["last-attention=none"] if "maskclip" in variants else []
    parts += ["normalisation=authors"] if "authors-normalisation" in variants else []
    parts += [f"background={background:g}"] if background is not None else []
    return [*parts, classes_part(data), templates_part(data)]


PROTOCOL = Protocol(
    name="segmentation/patch-cosine@2",
    parts=_parts,
    evaluate=evaluate,
    measures=measures,
    variants={name: {"variants": [name]} for name in ("whole-image", "maskclip", "authors-normalisation")},
)
