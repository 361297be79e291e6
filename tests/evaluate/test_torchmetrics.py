"""Metrics against torchmetrics, on whatever sizes, labels and owners hypothesis comes up with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index
from torchmetrics.retrieval import RetrievalHitRate

from sail_align.align.stats.metrics import ranks, unit_rows
from sail_align.evaluate.tasks import classification, retrieval, segmentation
from sail_align.evaluate.tasks.metrics import count_pixels, iou_per_class, top_k_hits
from sail_align.extract.data import IGNORED

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)


def values_of(metrics, items):
    return {metric.name: metric.compute(np.ones(items)) for metric in metrics}


@pytest.mark.slow
@few
@given(st.integers(2, 30), st.integers(1, 60), SEEDS)
def test_recall_equals_torchmetrics(images, captions, seed):
    """An image may own several captions, or none: then it is there to be found, and does not ask."""
    generator = np.random.default_rng(seed)
    owner_M = generator.integers(0, images, captions)
    image_NE = unit_rows(generator.normal(size=(images, 8)))
    text_ME = unit_rows(generator.normal(size=(captions, 8)) + image_NE[owner_M])
    found = dict(zip(("image_rank", "text_rank"), ranks(image_NE, text_ME, owner_M), strict=True))
    values = values_of(retrieval.TASK.metrics({**found, "owner": owner_M}), images)
    scores_NM = torch.from_numpy(image_NE @ text_ME.T)
    right_NM = torch.from_numpy(owner_M == np.arange(images)[:, None])
    for way, scores_QI, right_QI in (("i2t", scores_NM, right_NM), ("t2i", scores_NM.T, right_NM.T)):
        query_QI = torch.arange(len(scores_QI))[:, None].expand_as(scores_QI)
        for k in (1, 5, 10):
            metric = RetrievalHitRate(top_k=k, empty_target_action="skip")
            metric.update(scores_QI.reshape(-1), right_QI.reshape(-1), indexes=query_QI.reshape(-1))
            assert values[f"{way}_r{k}"] == pytest.approx(metric.compute().item(), abs=1e-6)


@few
@given(st.integers(2, 12), st.integers(1, 6), SEEDS)
def test_accuracies_equal_torchmetrics(classes, each, seed):
    generator = np.random.default_rng(seed)
    labels_N = np.concatenate([np.arange(classes), generator.integers(0, classes, classes * each)])
    scores_NC = generator.normal(size=(len(labels_N), classes)) + 2 * np.eye(classes)[labels_N]
    scores, labels = torch.from_numpy(scores_NC), torch.from_numpy(labels_N)
    for k in {1, min(5, classes)}:
        expected = multiclass_accuracy(scores, labels, classes, average="micro", top_k=k)
        assert top_k_hits(scores_NC, labels_N, k).mean() == pytest.approx(expected.item(), abs=1e-6)
    hits_N = top_k_hits(scores_NC, labels_N, 1)
    outcomes = {"top1": hits_N, "top5": hits_N, "label": labels_N, "classes": np.array([classes])}
    values = values_of(classification.TASK.metrics(outcomes), len(labels_N))
    expected = multiclass_accuracy(scores, labels, classes, average="macro")
    assert values["mean_per_class"] == pytest.approx(expected.item(), abs=1e-6)


@few
@given(st.integers(2, 9), st.integers(1, 5), SEEDS)
def test_segmentation_scores_equal_torchmetrics(classes, pictures, seed):
    generator = np.random.default_rng(seed)
    truth_NHW = generator.integers(0, classes, (pictures, 7, 11)).astype(np.uint8)
    truth_NHW[0, 0] = np.arange(11) % classes  # each class occurs: they give one that is only predicted a share
    predicted_NHW = np.where(generator.random(truth_NHW.shape) < 0.4, generator.integers(0, classes), truth_NHW)
    truth_NHW[generator.random(truth_NHW.shape) < 0.2] = IGNORED
    truth_NHW[0, 0] = np.arange(11) % classes
    counts_N3C = np.stack([count_pixels(*pair, classes) for pair in zip(truth_NHW, predicted_NHW, strict=True)])
    counts = counts_N3C.transpose(1, 0, 2)
    outcomes = dict(zip(("hits", "truth", "predicted"), counts, strict=True))
    given_both = torch.from_numpy(predicted_NHW.astype(np.int64)), torch.from_numpy(truth_NHW.astype(np.int64))
    iou_C = multiclass_jaccard_index(*given_both, classes, average="none", ignore_index=IGNORED)
    np.testing.assert_allclose(iou_per_class(*(count.sum(axis=0) for count in counts)), iou_C, atol=1e-6)
    values = values_of(segmentation.TASK.metrics(outcomes), pictures)
    miou = multiclass_jaccard_index(*given_both, classes, average="macro", ignore_index=IGNORED)
    accuracy = multiclass_accuracy(*given_both, classes, average="micro", ignore_index=IGNORED)
    assert values["miou"] == pytest.approx(miou.item(), abs=1e-6)
    assert values["pixel_accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
