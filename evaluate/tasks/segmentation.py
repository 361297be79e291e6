"""Zero-shot segmentation, plain form: each patch is named by the class whose prompts are closest to it.

The whole image with its short side at twice the encoder's own size (448 for an encoder of 224, the paper's), each patch
through the image head, cosine with the class embeddings, bilinear to the mask's size, argmax; mIoU over the confusion
matrix of all images. No sliding window and no background class: published ADE20K and VOC numbers use another protocol.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.metrics import chance_mean_iou, confusion_matrix, iou_per_class, mean_iou
from sail_align.evaluate.overlay import class_colours, overlay
from sail_align.evaluate.results import Example, Measure, Note, Outcomes, Picture, Result, summarise
from sail_align.evaluate.tasks.base import Protocol, classes_part, templates_part
from sail_align.extract.encoders.preprocessing import to_pixels
from sail_align.extract.errors import UserError
from sail_align.extract.progress import progress
from sail_align.extract.sources.base import IGNORED, Sample

SCALE = 2
"""Short side of the input, in sizes of the encoder's own input: 2 × 224 are the paper's 448."""


def evaluate(data: EvaluationSet) -> Result:
    """Score mIoU and pixel accuracy."""
    samples, classes_CE = data.samples, torch.from_numpy(data.class_embeddings())
    short_side = SCALE * data.encoders.image.size
    counts = []
    with progress(len(samples), f"{data.manifest.name} patches", quiet=data.quiet) as bar:
        for sample in samples:
            truth = _mask(data, sample)
            counts.append(_counts(data, sample, truth, segment(data, sample, truth.shape, classes_CE, short_side)))
            bar.update(1)
    hits_NC, truth_NC, predicted_NC = np.stack(counts, axis=1)
    if not truth_NC.any():
        raise UserError(f"No mask of {data.manifest.name} has a pixel of a listed class; correct 'classes' or 'masks'.")
    chosen = _spread(samples, hits_NC, truth_NC)
    examples = tuple(_example(data, sample, classes_CE, short_side) for sample in chosen)
    iou_C = iou_per_class(hits_NC.sum(0), truth_NC.sum(0), predicted_NC.sum(0))
    names = data.source.classes
    per_class = {names[label]: 100 * float(iou_C[label]) for label in np.flatnonzero(truth_NC.sum(0))}
    outcomes = {"hits": hits_NC, "truth": truth_NC, "predicted": predicted_NC}
    metrics = summarise(measures(outcomes), len(samples))
    return Result(len(samples), metrics, examples, outcomes, {"iou": per_class})


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of pixels `hits`, `truth` and `predicted` by image and class, (N, C)."""
    hits_NC, truth_NC, predicted_NC = (outcomes[name].astype(np.float64) for name in ("hits", "truth", "predicted"))

    def miou(drawn_N: NDArray[np.float64]) -> float:
        return mean_iou(drawn_N @ hits_NC, drawn_N @ truth_NC, drawn_N @ predicted_NC)

    def accuracy(drawn_N: NDArray[np.float64]) -> float:
        pixels = (drawn_N @ truth_NC).sum()
        return float((drawn_N @ hits_NC).sum() / pixels) if pixels else float("nan")

    return (
        Measure("miou", "mIoU", chance_mean_iou(outcomes["truth"].sum(axis=0)), miou),
        Measure("pixel_accuracy", "pixel accuracy", 1 / truth_NC.shape[1], accuracy),
    )


def segment(
    data: EvaluationSet, sample: Sample, shape: tuple[int, ...], classes_CE: torch.Tensor, short_side: int
) -> NDArray[np.int64]:
    """Return a class for each pixel, `shape` (H, W), of the image with its short side at `short_side`."""
    encoder = data.encoders.image
    image = data.source.image(sample.image)
    pixels_1HWC = _resized(image, short_side, encoder.stride)[None]
    with torch.inference_mode():
        patches_hwD = encoder.encode_dense(pixels_1HWC)[0]
        height, width, dim = patches_hwD.shape
        embedded_PE = data.run.model.encode_image(patches_hwD.reshape(-1, dim).to(data.encoders.device)).float().cpu()
        scores_1Chw = (embedded_PE @ classes_CE.T).T.reshape(1, -1, height, width)
        scores_1CHW = F.interpolate(scores_1Chw, size=shape, mode="bilinear", align_corners=False)
    labels: NDArray[np.int64] = scores_1CHW[0].argmax(dim=0).numpy()
    return labels


def _resized(image: Image.Image, short_side: int, stride: int) -> torch.Tensor:
    """Return the whole image, (H, W, 3) uint8, sides the nearest multiples of the stride."""
    factor = short_side / min(image.size)
    width, height = (max(round(side * factor / stride), 1) * stride for side in image.size)
    return to_pixels(image.resize((width, height), Image.Resampling.BICUBIC))


def _mask(data: EvaluationSet, sample: Sample) -> NDArray[np.uint8]:
    try:
        return data.source.mask(sample.mask)
    except (OSError, SyntaxError, ValueError) as problem:  # Pillow's ways to report broken bytes
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} cannot be read ({problem}).") from problem


def _counts(
    data: EvaluationSet, sample: Sample, truth: NDArray[np.uint8], predicted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return pixels right, true and predicted by class, (3, C)."""
    try:
        confusion_CC = confusion_matrix(truth, predicted, len(data.source.classes))
    except ValueError as problem:
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} holds a {problem}.") from problem
    return np.stack([np.diagonal(confusion_CC), confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)])


def _spread(samples: list[Sample], hits_NC: NDArray[np.int64], truth_NC: NDArray[np.int64]) -> list[Sample]:
    """Return up to five samples from the worst to the best by pixel accuracy."""
    accuracy_N = hits_NC.sum(axis=1) / np.maximum(truth_NC.sum(axis=1), 1)
    order = np.argsort(accuracy_N, kind="stable")
    positions = np.linspace(len(order) - 1, 0, min(5, len(order))).astype(int)
    return [samples[row] for row in order[positions]]


def _example(data: EvaluationSet, sample: Sample, classes_CE: torch.Tensor, short_side: int) -> Example:
    image, truth, names = data.source.image(sample.image), _mask(data, sample), data.source.classes
    predicted = segment(data, sample, truth.shape, classes_CE, short_side)
    hits_C, truth_C, predicted_C = _counts(data, sample, truth, predicted)
    colours = class_colours(truth_C, predicted_C)
    there = ", ".join(names[label] for label in np.flatnonzero(truth_C))
    legend = tuple(Note(names[label], colour=f"rgb{colour}") for label, colour in colours.items())
    counted = np.where(truth == IGNORED, IGNORED, predicted)
    guesses = "predicted classes: " + ", ".join(names[label] for label in colours if predicted_C[label])
    pictures = [
        Picture(image, alt=f"photo with {there}", caption="image"),
        Picture(overlay(image, truth.astype(np.int64), colours), alt=f"true classes: {there}", caption="truth"),
        Picture(overlay(image, counted, colours), alt=guesses, caption="prediction where it counts"),
    ]
    if (truth == IGNORED).any():
        everywhere = overlay(image, predicted, colours)
        pictures.append(Picture(everywhere, alt=f"{guesses}, and those around", caption="prediction everywhere"))
    return Example(f"pixel accuracy {100 * hits_C.sum() / max(truth_C.sum(), 1):.1f}", None, tuple(pictures), legend)


PROTOCOL = Protocol(
    name="segmentation/patch-cosine@1",
    parts=lambda data: (classes_part(data), templates_part(data)),
    evaluate=evaluate,
    measures=measures,
)
