"""Zero-shot segmentation: each pixel gets the class whose prompts are closest to the patches around it.

The protocol of the paper's tables: the picture is scaled to a short side of 448 (a long side of at most 2048) and cut
into windows of 448 every 224 pixels. Each patch goes through the image head, paired with its window's class token if
the encoder's pooling is `cls+mean`. Its cosines with the class embeddings are interpolated to the window, averaged over
overlaps and interpolated to the size of the mask. The class is the argmax, and mIoU is computed from the confusion
matrix of all images. Pixels of no class are ignored, and there is no background class unless the task sets a threshold.

Variants have protocol ids of their own: `whole-image` encodes the picture in one piece, `maskclip` lets patches skip
the last attention, `authors-normalisation` normalises pixels as CLIP does for any encoder, as the authors' code does.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sail_align.evaluate.results.metric import Annotation, Example, Metric, Outcomes, Picture, Result
from sail_align.evaluate.tasks.metrics import chance_mean_iou, confusion_matrix, iou_per_class, mean_iou
from sail_align.evaluate.tasks.overlay import class_colours, overlay
from sail_align.evaluate.tasks.task import EvaluationTask
from sail_align.extract.data import IGNORED, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.system.progress import progress

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import EvaluationSet
    from sail_align.extract.manifest import TaskSettings

Counts = NDArray[np.int64]
Labels = NDArray[np.uint8]

SHOWN, CANDIDATES, SHOWN_SIDE = 5, 64, 512
"""Pictures in the report, the number of pictures spread over the set they are taken from, and their largest side."""


def evaluate(data: "EvaluationSet") -> Result:
    """Return right, true and predicted pixels by image and class, and the IoU of each class."""
    from sail_align.evaluate.segmenter import Segmenter

    samples, segmenter = data.samples, Segmenter(data)
    candidate_rows = set(np.linspace(0, len(samples) - 1, min(CANDIDATES, len(samples))).astype(int).tolist())
    counts, candidates, masks = [], [], hashlib.sha256()
    with progress(len(samples), f"{data.manifest.name} patches", unit="image", quiet=data.quiet) as bar:
        for row, sample in enumerate(samples):
            truth = _read_mask(data, sample)
            masks.update(repr(truth.shape).encode() + truth.tobytes())
            predicted = segmenter.label(sample, truth.shape)
            counts.append(_count_pixels(data, sample, truth, predicted))
            if row in candidate_rows and counts[-1][1].any():
                candidates.append(_Segmented(sample, _thin(truth), _thin(predicted), counts[-1]))
            bar.update(1)
    counts_N3C = np.stack(counts)
    hits_C, truth_C, predicted_C = counts_N3C.sum(axis=0)
    if not truth_C.any():
        raise UserError(f"No mask of {data.manifest.name} has a pixel of a listed class. Correct 'classes' or 'masks'.")
    names, iou_C = data.source.classes, iou_per_class(hits_C, truth_C, predicted_C)
    present = np.flatnonzero(truth_C)
    share = float(truth_C.max() / truth_C.sum())
    details = {
        "iou": {names[label]: 100 * float(iou_C[label]) for label in present},
        "most_frequent_class": {
            "name": names[int(truth_C.argmax())],
            "miou": 100 * share / len(present),
            "pixel_accuracy": 100 * share,
        },
    }
    outcomes = dict(zip(("hits", "truth", "predicted"), counts_N3C.transpose(1, 0, 2), strict=True))
    candidates.sort(key=lambda candidate: candidate.accuracy)
    chosen = np.linspace(len(candidates) - 1, 0, min(SHOWN, len(candidates))).astype(int)  # from best to worst
    examples = [candidates[place].example(data) for place in chosen]
    return Result(len(samples), outcomes, examples, details, masks.hexdigest())


def metrics(outcomes: Outcomes) -> tuple[Metric, ...]:
    """Return the metrics of the pixels `hits`, `truth` and `predicted` by image and class, (N, C)."""
    hits_NC, truth_NC, predicted_NC = (outcomes[name].astype(np.float64) for name in ("hits", "truth", "predicted"))
    right_N, pixels_N = hits_NC.sum(axis=1), truth_NC.sum(axis=1)

    def miou(drawn_N: NDArray[np.float64]) -> float:
        return mean_iou(drawn_N @ hits_NC, drawn_N @ truth_NC, drawn_N @ predicted_NC)

    def accuracy(drawn_N: NDArray[np.float64]) -> float:
        pixels = drawn_N @ pixels_N
        return float(drawn_N @ right_N / pixels) if pixels else float("nan")

    return (
        Metric("miou", "mIoU", chance_mean_iou(truth_NC.sum(axis=0)), miou),
        Metric("pixel_accuracy", "pixel accuracy", 1 / truth_NC.shape[1], accuracy),
    )


def _read_mask(data: "EvaluationSet", sample: Sample) -> Labels:
    try:
        return data.source.mask(sample.mask)
    except (OSError, SyntaxError, ValueError) as problem:  # how Pillow reports broken bytes
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} cannot be read ({problem}).") from problem


def _count_pixels(data: "EvaluationSet", sample: Sample, truth: Labels, predicted: Labels) -> Counts:
    """Return the numbers of right, true and predicted pixels by class, (3, C)."""
    try:
        confusion_CC = confusion_matrix(truth, predicted, len(data.source.classes))
    except ValueError as problem:
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} has a {problem}.") from problem
    return np.stack([np.diagonal(confusion_CC), confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)])


def _thin(labels_HW: Labels) -> Labels:
    """Return every n-th pixel of every n-th row, so that no side is longer than `SHOWN_SIDE`."""
    step = -(-max(labels_HW.shape) // SHOWN_SIDE)
    return labels_HW[::step, ::step].copy()


@dataclass(frozen=True)
class _Segmented:
    """A picture that the report may show, with its thinned labels and its pixel counts (3, C)."""

    sample: Sample
    truth: Labels
    predicted: Labels
    counts: Counts

    @property
    def accuracy(self) -> float:
        hits_C, truth_C, _ = self.counts
        return float(hits_C.sum() / truth_C.sum())

    def example(self, data: "EvaluationSet") -> Example:
        image, names = data.source.image(self.sample.image), data.source.classes
        truth, predicted = self.truth, self.predicted
        _, truth_C, predicted_C = self.counts
        colours = class_colours(truth_C, predicted_C)
        present = ", ".join(names[label] for label in np.flatnonzero(truth_C))
        legend = tuple(Annotation(names[label], colour=f"rgb{colour}") for label, colour in colours.items())
        counted = np.where(truth == IGNORED, IGNORED, predicted)
        guesses = "predicted classes: " + ", ".join(names[label] for label in colours if predicted_C[label])
        pictures = [
            Picture.of(image, alt=f"photo with {present}", caption="image"),
            Picture.of(overlay(image, truth, colours), alt=f"true classes: {present}", caption="truth"),
            Picture.of(overlay(image, counted, colours), alt=guesses, caption="prediction where it counts"),
        ]
        if (truth == IGNORED).any():
            everywhere = overlay(image, predicted, colours)
            pictures.append(Picture.of(everywhere, alt=f"{guesses}, and elsewhere", caption="prediction everywhere"))
        return Example(f"pixel accuracy {100 * self.accuracy:.1f}", None, tuple(pictures), legend)


def _protocol_parts(settings: "TaskSettings") -> list[str]:
    from sail_align.evaluate.segmenter import STRIDE, WINDOW

    variants, background = settings.variants, settings.background
    parts = [f"windows={'none' if 'whole-image' in variants else f'{WINDOW}-by-{STRIDE}'}"]
    parts += ["last-attention=none"] if "maskclip" in variants else []
    parts += ["normalisation=authors"] if "authors-normalisation" in variants else []
    return parts + ([f"background={background:g}"] if background is not None else [])


TASK = EvaluationTask(
    kind="segmentation",
    summary="Zero-shot segmentation by patches. mIoU and pixel accuracy.",
    title="Zero-shot segmentation",
    how_to_read="Each pixel gets the class whose prompts are closest to its patch. Pixels of no class are ignored.",
    protocol="segmentation/patch-cosine@2",
    needs=frozenset({"masks"}),
    evaluate=evaluate,
    metrics=metrics,
    headlines=("miou",),
    variants={name: {"variants": [name]} for name in ("whole-image", "maskclip", "authors-normalisation")},
    protocol_parts=_protocol_parts,
)
