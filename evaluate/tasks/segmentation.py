"""Zero-shot segmentation: each pixel gets the class whose prompts are closest to the patches around it.

The protocol of the paper's tables: the picture is scaled to a short side of 448 (a long side of at most 2048) and cut
into windows of 448 every 224 pixels. Each patch goes through the image head, paired with its window's class token if
the encoder's pooling is `cls+mean`. Its cosines with the class embeddings are interpolated to the window, averaged over
overlaps and interpolated to the size of the mask. The class is the argmax, and mIoU is computed from the pixel counts
of all images. Pixels without a class are ignored. A background class exists only if the task sets a threshold.

Variants have protocol ids of their own: `whole-image` encodes the picture in one piece, `maskclip` lets patches skip
the last attention, `authors-normalisation` normalises pixels as CLIP does for any encoder, as the authors' code does.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.align.stats.overlay import PALETTE, overlay
from sail_align.evaluate.results.metric import Annotation, Example, Metric, Outcomes, Picture, Result
from sail_align.evaluate.tasks.metrics import count_pixels, iou_per_class
from sail_align.evaluate.tasks.task import EvaluationTask
from sail_align.extract.data import IGNORED, Sample, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.system.progress import progress

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import EvaluationSet
    from sail_align.extract.manifest import TaskSettings

Labels = NDArray[np.uint8]

SHOWN, CANDIDATES, SHOWN_SIDE = 5, 64, 512
"""Pictures in the report, the number of pictures spread over the set they are taken from, and their largest side."""


class Segmentation(EvaluationTask):
    """The class of each pixel."""

    def evaluate(self, data: "EvaluationSet") -> Result:
        """Return right, true and predicted pixels by image and class, and the IoU of each class."""
        from sail_align.evaluate.dataset import mask_bytes
        from sail_align.evaluate.segmenter import Segmenter

        samples, names, segmenter = data.samples, data.source.classes, Segmenter(data)
        candidate_rows = set(np.linspace(0, len(samples) - 1, min(CANDIDATES, len(samples))).astype(int).tolist())
        counts, candidates, masks = [], [], hashlib.sha256()
        with progress(len(samples), f"{data.manifest.name} patches", unit="image", quiet=data.quiet) as bar:
            for row, sample in enumerate(samples):
                truth = _read_mask(data, sample)
                if (highest := int(truth[truth != IGNORED].max(initial=0))) >= len(names):
                    raise UserError(
                        f"Mask {sample.mask!r} of {data.manifest.name} is invalid: got the value {highest}, expected "
                        f"one of {len(names)} classes or {IGNORED}. Correct it."
                    )
                masks.update(mask_bytes(truth))
                predicted = segmenter.label(sample, truth.shape)
                counts.append(count_pixels(truth, predicted, len(names)))
                if row in candidate_rows and counts[-1][1].any():
                    step = -(-max(truth.shape) // SHOWN_SIDE)
                    thin = np.s_[::step, ::step]
                    candidates.append(_Segmented(sample, truth[thin].copy(), predicted[thin].copy(), counts[-1]))
                bar.update(1)
        counts_N3C = np.stack(counts)
        hits_C, truth_C, predicted_C = counts_N3C.sum(axis=0)
        if not truth_C.any():
            name = data.manifest.name
            raise UserError(f"No mask of {name} has a pixel of a listed class. Correct 'classes' or 'masks'.")
        iou_C = iou_per_class(hits_C, truth_C, predicted_C)
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

    def metrics(self, outcomes: Outcomes) -> tuple[Metric, ...]:
        """Return the metrics of the pixels `hits`, `truth` and `predicted` by image and class, (N, C).

        mIoU is the mean over the classes in the truth. Predictions of other classes lower it through the unions. Its
        chance is that of labels drawn uniformly at random, in the limit of many pixels: a class with a share p of the
        pixels has p / C of them as hits, and a union of p + 1 / C − p / C.
        """
        hits_NC, truth_NC, predicted_NC = (outcomes[name].astype(np.float64) for name in ("hits", "truth", "predicted"))
        right_N, pixels_N = hits_NC.sum(axis=1), truth_NC.sum(axis=1)

        def miou(drawn_N: NDArray[np.float64]) -> float:
            truth_C = drawn_N @ truth_NC
            iou_C = iou_per_class(drawn_N @ hits_NC, truth_C, drawn_N @ predicted_NC)
            return weighted_mean(iou_C[truth_C > 0], np.ones(np.count_nonzero(truth_C)))

        def accuracy(drawn_N: NDArray[np.float64]) -> float:
            pixels = drawn_N @ pixels_N
            return float(drawn_N @ right_N / pixels) if pixels else float("nan")

        classes, truth_C = truth_NC.shape[1], truth_NC.sum(axis=0)
        share_C = truth_C[truth_C > 0] / truth_C.sum()
        return (
            Metric("miou", "mIoU", float((share_C / (classes * share_C + 1 - share_C)).mean()), miou),
            Metric("pixel_accuracy", "pixel accuracy", 1 / classes, accuracy),
        )

    def protocol_parts(self, settings: "TaskSettings") -> list[str]:
        """Return the windows, the departures from the protocol, and the background threshold."""
        from sail_align.align.segmentation import STRIDE, WINDOW

        variants, background = settings.variants, settings.background
        parts = [f"windows={'none' if 'whole-image' in variants else f'{WINDOW}-by-{STRIDE}'}"]
        parts += ["last-attention=none"] if "maskclip" in variants else []
        parts += ["normalisation=authors"] if "authors-normalisation" in variants else []
        return parts + ([f"background={background:g}"] if background is not None else [])


def _read_mask(data: "EvaluationSet", sample: Sample) -> Labels:
    try:
        return data.source.mask(sample.mask)
    except (UnreadableImageError, OSError) as problem:
        raise UserError(f"Mask {sample.mask!r} of {data.manifest.name} cannot be read ({problem}).") from problem


@dataclass(frozen=True)
class _Segmented:
    """A picture that the report may show, with its pixel counts (3, C) and its labels.

    The labels are those of every n-th pixel of every n-th row, so that no side is longer than `SHOWN_SIDE`.
    """

    sample: Sample
    truth: Labels
    predicted: Labels
    counts: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        hits_C, truth_C, _ = self.counts
        return float(hits_C.sum() / truth_C.sum())

    def example(self, data: "EvaluationSet") -> Example:
        image, names = data.source.image(self.sample.image), data.source.classes
        _, truth_C, predicted_C = self.counts
        order = np.lexsort((-predicted_C, -truth_C))  # the true classes by size, then those that are only predicted
        labels = [int(label) for label in order if truth_C[label] or predicted_C[label]]
        colours = dict(zip(labels, PALETTE, strict=False))

        def tinted(labels_HW: Labels, alt: str, caption: str) -> Picture:
            return Picture.of(overlay(image, labels_HW, colours), alt, caption=caption)

        present = ", ".join(names[label] for label in np.flatnonzero(truth_C))
        guesses = "predicted classes: " + ", ".join(names[label] for label in colours if predicted_C[label])
        ignored = self.truth == IGNORED
        pictures = [
            Picture.of(image, f"photo with {present}", caption="image"),
            tinted(self.truth, f"true classes: {present}", "truth"),
            tinted(np.where(ignored, self.truth, self.predicted), guesses, "prediction where it counts"),
        ]
        if ignored.any():
            pictures.append(tinted(self.predicted, f"{guesses}, and elsewhere", "prediction everywhere"))
        legend = tuple(Annotation(names[label], colour=f"rgb{colour}") for label, colour in colours.items())
        return Example(f"pixel accuracy {100 * self.accuracy:.1f}", None, tuple(pictures), legend)


TASK = Segmentation(
    kind="segmentation",
    summary="Zero-shot segmentation by patches. mIoU and pixel accuracy.",
    title="Zero-shot segmentation",
    how_to_read="Each pixel gets the class whose prompts are closest to its patch. Pixels of no class are ignored.",
    protocol="segmentation/patch-cosine@2",
    needs=frozenset({"masks"}),
    headlines=("miou",),
    variants={name: {"variants": [name]} for name in ("whole-image", "maskclip", "authors-normalisation")},
)
