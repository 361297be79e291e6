"""Rows stay in their places, whatever happens to them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes import FakeText, FakeVision

from sail_align.extract.pipeline import encode_images, encode_texts
from sail_align.extract.sources.descriptions import TableSource as Table
from sail_align.extract.sources.table import TableSource
from sail_align.extract.status import Status


@pytest.fixture
def source(pictures):
    return TableSource(
        Table(kind="table", files="captions.csv", images="images", captions={"raw": "caption"}), pictures
    )


def test_each_image_is_encoded_into_its_own_row_and_a_bad_one_shifts_nothing(source):
    samples = list(source.samples())[:100]
    done = []
    with ThreadPoolExecutor(2) as decoders:
        features, status = encode_images(samples, source, FakeVision(), decoders, done.append)
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


def test_texts_sorted_by_length_come_back_in_order():
    texts = ["x" * (1 + 37 * i % 101) + str(i) for i in range(300)]
    texts[10], texts[20], texts[30] = None, "  ", "inf"
    features, status = encode_texts(texts, FakeText(), lambda rows: None)
    bad = {10: Status.MISSING, 20: Status.MISSING, 30: Status.NON_FINITE}
    for row, text in enumerate(texts):
        assert status[row] == bad.get(row, Status.OK)
        if row in bad:
            assert np.isnan(features[row]).all()
        else:
            assert features[row, 0] == len(text)
            assert features[row, 3] == ord(text[-1])
