"""Every row keeps its place, whether it can be encoded or not."""

import numpy as np
import pytest
import torch
from fakes import FakeText, FakeVision

from sail_align.extract.data import Status
from sail_align.extract.executor.encode import encode_images, encode_texts
from sail_align.extract.sources.table import TableConfig


@pytest.fixture
def source(pictures):
    return TableConfig(kind="table", files="captions.csv", images="images", captions={"raw": "caption"}).open(pictures)


@pytest.mark.slow
def test_unreadable_images_do_not_shift_rows(source):
    samples = list(source.samples())[:100]
    done = []
    ((features, status),) = encode_images(samples, source, FakeVision(), 2, done.append)
    assert sum(done) == 100
    bad = {7: Status.MISSING, 11: Status.UNDECODABLE, 13: Status.UNDECODABLE}
    encoder = FakeVision()
    for row, sample in enumerate(samples):
        assert status[row] == bad.get(row, Status.OK)
        if row in bad:
            assert np.isnan(features[row]).all()
        else:
            alone = encoder.encode(encoder.preprocess(source.image(sample.image))[None])[0]
            np.testing.assert_allclose(features[row], alone, rtol=1e-3)


def test_texts_are_returned_in_input_order():
    texts = ["x" * (1 + 37 * i % 101) + str(i) for i in range(300)]
    texts[10], texts[20], texts[30], texts[40] = None, "  ", "inf", "a caf\N{REPLACEMENT CHARACTER} in Paris"
    texts[50] = "x" * 99_999 + "y"
    done = []
    ((features, status),) = encode_texts(texts, FakeText(), done.append)
    assert sum(done) == 300
    bad = {10: Status.MISSING, 20: Status.MISSING, 30: Status.NON_FINITE, 40: Status.UNDECODABLE}
    for row, text in enumerate(texts):
        assert status[row] == bad.get(row, Status.OK)
        if row in bad:
            assert np.isnan(features[row]).all()
        else:
            assert features[row, 0] == min(len(text), 1000)
            assert features[row, 3] == ord(text[-1])


def test_unreadable_images_are_black_in_their_batch(source):
    batches = []

    class Watched(FakeVision):
        def encode(self, pixels_BHWC):
            batches.append(pixels_BHWC.clone())
            return super().encode(pixels_BHWC)

    samples = list(source.samples())[:40]
    encode_images(samples, source, Watched(), 2, lambda rows: None)
    for row, pixels in enumerate(torch.cat(batches)):
        black = row in (7, 11, 13)
        assert torch.equal(pixels, torch.zeros(8, 8, 3)) if black else (pixels > 0).any()
    assert [len(batch) for batch in batches] == [32, 8]


def test_non_finite_features_become_a_status(source):
    class Overflowing(FakeVision):
        def encode(self, pixels_BHWC):
            features = super().encode(pixels_BHWC)
            features[3], features[4, 1], features[5, 2] = float("nan"), float("-inf"), 1e6  # beyond float16
            return features

    ((features, status),) = encode_images(list(source.samples())[:7], source, Overflowing(), 2, lambda rows: None)
    assert status.tolist() == [Status.OK] * 3 + [Status.NON_FINITE] * 3 + [Status.OK]
    assert np.isnan(features[3:6]).all()


def test_encoder_is_not_called_if_no_image_is_readable(source):
    class Never(FakeVision):
        def encode(self, pixels_BHWC):
            raise AssertionError("called without readable images")

    samples = [list(source.samples())[row] for row in (7, 11, 13)]
    ((features, status),) = encode_images(samples, source, Never(), 2, lambda rows: None)
    assert status.tolist() == [Status.MISSING, Status.UNDECODABLE, Status.UNDECODABLE]
    assert np.isnan(features).all()
