"""Broken pairings are found and good ones pass, on features of known structure and on real photos."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import identity
from typer.testing import CliRunner

from sail_align.extract.cli import app
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.quality.doctor import Verdict, diagnose, sample_rows
from sail_align.extract.quality.pairing import ImageMap
from sail_align.extract.store.store import Store

IMAGE_DIM, TEXT_DIM = 24, 16
PHOTOS = Path(__file__).parents[2] / "../shared/data/flickr8k-dev"


def features(rows: int, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return image and text features that share six factors, each with independent noise."""
    random = np.random.default_rng(seed)
    factors = random.normal(size=(rows, 6))

    def side(dim: int) -> np.ndarray:
        return (factors @ random.normal(size=(6, dim)) + noise * random.normal(size=(rows, dim)) + 3).astype(np.float16)

    return side(IMAGE_DIM), side(TEXT_DIM)


def write(array, features_ND, missing=()):
    status = np.zeros(len(features_ND), dtype=np.uint8)
    features_ND = features_ND.copy()
    features_ND[list(missing)], status[list(missing)] = np.nan, Status.MISSING
    for shard in array.shards:
        rows = slice(*array.span(shard))
        array.write(shard, features_ND[rows], status[rows])


def make(path, image_ND, text_ND, *, missing=()):
    rows = len(image_ND)
    samples = [Sample(f"{i}", "", {"raw": "…"}) for i in range(rows)]
    store = Store.create(path, dataset="set", manifest={}, parts=[Part.of(samples)], captions=["raw"])
    write(store.add(identity("image", dim=image_ND.shape[1])), image_ND, missing)
    write(store.add(identity("text", dim=text_ND.shape[1]), "raw"), text_ND)
    return store


def half_permuted(text_ND, seed=3):
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(text_ND))[: len(text_ND) // 2]
    permuted = text_ND.copy()
    permuted[chosen] = text_ND[random.permutation(chosen)]
    return permuted


def all_permuted(text_ND):
    return text_ND[np.random.default_rng(4).permutation(len(text_ND))]


BREAKS = {
    "shifted by -1 row": lambda text: np.roll(text, -1, axis=0),
    "shifted by +1 row": lambda text: np.roll(text, 1, axis=0),
    "shifted by +4 rows": lambda text: np.roll(text, 4, axis=0),
    "of the captions do not belong": half_permuted,
    "no better than shuffled": all_permuted,
}


@pytest.mark.slow
@pytest.mark.parametrize(("message", "broken"), BREAKS.items())
@pytest.mark.parametrize("missing", [(), range(0, 900, 3)])
def test_broken_pairing_is_found(tmp_path, message, broken, missing):
    image_ND, text_ND = features(900)
    diagnosis = diagnose(make(tmp_path / "s.zarr", image_ND, broken(text_ND), missing=missing))
    assert diagnosis.verdict is Verdict.BROKEN
    assert message in diagnosis.summary


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_good_store_passes(tmp_path, seed):
    diagnosis = diagnose(make(tmp_path / "s.zarr", *features(250 + 50 * seed, seed, noise=2.0), missing=[1, 17]))
    assert diagnosis.summary == "good: the captions belong to their images."


@pytest.mark.slow
def test_single_wrong_shard_is_named(tmp_path):
    image_ND, text_ND = features(2_560)
    text_ND[512:768] = np.roll(text_ND[512:768], 1, axis=0)
    store = make(tmp_path / "s.zarr", image_ND, text_ND)
    assert store.shard_rows == 256
    assert "most captions in shard 2 do not belong to their images" in diagnose(store).summary


def test_equal_neighbours_are_not_a_shift(tmp_path):
    """Captions of class names, sorted by class: the next row's caption is as right as a row's own."""
    image_ND, text_ND = features(1_200)
    text_ND = np.repeat(text_ND[::40], 40, axis=0)
    image_ND = (image_ND * 0.3 + np.repeat(image_ND[::40], 40, axis=0)).astype(np.float16)
    assert diagnose(make(tmp_path / "s.zarr", image_ND, text_ND)).verdict is Verdict.GOOD


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.8])
def test_share_of_wrong_captions_is_estimated_within_its_error(share):
    """The mean over ten data sets. Right captions that are hard to recognise make it at most 0.05 too high."""
    estimates = []
    for seed in range(10):
        image_ND, text_ND = features(2_000, seed)
        random = np.random.default_rng(seed)
        chosen = random.permutation(2_000)[: round(2_000 * share)]
        text_ND[chosen] = text_ND[random.permutation(chosen)]
        usable = np.ones(2_000, dtype=bool)
        estimates.append(ImageMap(np.arange(2_000), image_ND, usable).examine(text_ND, usable).matched.wrong)
    mean, error = np.mean(estimates, axis=0)
    assert share - 3 * error / np.sqrt(10) <= mean <= share + 3 * error / np.sqrt(10) + 0.05


def test_percentiles_equal_a_plain_computation():
    """The same ridge regression by least squares on stacked rows, and percentiles by counting."""
    rows = 300
    image_ND, text_ND = features(rows)
    usable = np.ones(rows, dtype=bool)
    usable[::7] = False
    image_ND[::7] = np.nan
    images = ImageMap(np.arange(rows), image_ND, usable)
    matched = images.examine(text_ND, np.ones(rows, dtype=bool)).matched

    x, y = image_ND.astype(np.float64), text_ND.astype(np.float64)
    fitted, tested = images.fitted, images.tested
    assert sorted([*fitted, *tested]) == np.flatnonzero(usable).tolist()
    x = (x - x[fitted].mean(axis=0)) / x[fitted].std(axis=0)
    y = (y - y[fitted].mean(axis=0)) / y[fitted].std(axis=0)
    stacked = np.vstack([x[fitted], np.sqrt(2.0 * IMAGE_DIM) * np.eye(IMAGE_DIM)])
    target = np.vstack([y[fitted], np.zeros((IMAGE_DIM, TEXT_DIM))])
    weight = np.linalg.lstsq(stacked, target, rcond=None)[0]
    expected = []
    for row in tested:
        guess = x[row] @ weight
        cosines = [guess @ y[other] / np.linalg.norm(guess) / np.linalg.norm(y[other]) for other in tested]
        own = guess @ y[row] / np.linalg.norm(guess) / np.linalg.norm(y[row])
        expected.append(sum(c < own - 1e-9 for c in cosines) / len(tested) + 0.5 / len(tested))
    np.testing.assert_allclose(matched.values, expected, atol=1e-12)
    assert matched.places.tolist() == tested.tolist()


def test_too_few_rows_give_no_verdict(tmp_path):
    diagnosis = diagnose(make(tmp_path / "s.zarr", *features(180)))
    assert diagnosis.verdict is Verdict.UNKNOWN
    assert diagnosis.summary.startswith(
        "cannot tell whether captions belong to their images: image/fake-image has 180 usable rows"
    )


def test_constant_features_do_not_divide_by_zero(tmp_path):
    ones = np.ones((300, 4), dtype=np.float16)
    diagnosis = diagnose(make(tmp_path / "s.zarr", ones, ones))
    assert "no better than shuffled" in diagnosis.summary
    assert "norms 2 to 2 (median 2), 4 of 4 dimensions are constant, 299 of 300 rows repeat" in diagnosis.lines[0]


def test_large_store_is_sampled_over_its_whole_length():
    rows = sample_rows(12_900_000)
    assert len(rows) == 16_384
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert 12_899_700 < rows[-1] < 12_900_000
    assert len(np.unique(rows // 1_024)) == 128  # each stretch is in one chunk


@pytest.mark.slow
def test_doctor_command_prints_a_verdict_and_sets_the_exit_code(tmp_path):
    image_ND, text_ND = features(600)
    make(tmp_path / "good.zarr", image_ND, text_ND, missing=range(6))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "good.zarr")])
    assert done.exit_code == 0
    assert "image/fake-image: 1.0% missing, 99.0% ok, norms" in done.output
    assert done.output.splitlines()[-1] == f"{tmp_path}/good.zarr: good: the captions belong to their images."
    make(tmp_path / "bad.zarr", image_ND, np.roll(text_ND, 1, axis=0))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "bad.zarr")])
    assert done.exit_code == 1
    assert "the pairing is broken" in done.output.splitlines()[-1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Store:
    """400 real photos with one caption each, through the packaged encoders."""
    if not PHOTOS.exists():
        pytest.skip(f"no photos at {PHOTOS}")
    folder = tmp_path_factory.mktemp("photos")
    with (PHOTOS / "captions.csv").open() as file:
        captions = {row["image"]: row["caption"] for row in csv.DictReader(file)}
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *list(captions.items())[:400]])
    (folder / "photos.yaml").write_text(
        f"{{name: photos, purpose: train, title: t, licence: l, get: g, source: {{kind: table, captions: "
        f"{{raw: caption}}, files: captions.csv, images: {(PHOTOS / 'images').resolve()}}}}}"
    )
    *_, checked, following = extract(folder, folder / "s.zarr")
    assert checked == "pairing check: good: the captions belong to their images."
    assert following == f"Next: sail-align fit --features {folder}/s.zarr"
    return Store.open(folder / "s.zarr")


def extract(folder: Path, out: Path) -> list[str]:
    encoders = ["--image-encoder", "efficientnet-lite0", "--image-size", "96", "--text-encoder", "minilm-l6"]
    done = CliRunner().invoke(app, ["run", f"{folder}/photos.yaml", "--out", str(out), "--quiet", *encoders])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("message", "broken"), BREAKS.items())
def test_broken_captions_of_real_photos_are_found(photos, tmp_path, message, broken):
    text_ND = photos.text("raw").read()[0]
    shutil.copytree(photos.path, tmp_path / "s.zarr")
    store = Store.open(tmp_path / "s.zarr")
    write(store.text("raw"), broken(text_ND))
    diagnosis = diagnose(store)
    assert diagnosis.verdict is Verdict.BROKEN
    assert message in diagnosis.summary
    *_, checked, following = extract(photos.path.parent, tmp_path / "s.zarr")
    assert checked == f"warning: pairing check: {diagnosis.summary}"
    assert following == f"Next: sail-extract doctor {tmp_path}/s.zarr"


@pytest.mark.slow
def test_kernel_independence_measure_agrees_on_real_photos(photos):
    """HSIC, the inner product of the centred Gram matrices, against its values under permutations."""
    image_ND, text_ND = photos.image().read()[0], photos.text("raw").read()[0]

    def gram(features_ND):
        centred = features_ND.astype(np.float64) - features_ND.astype(np.float64).mean(axis=0)
        kernel = centred @ centred.T
        return kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean()

    image_NN, text_NN = gram(image_ND), gram(text_ND)
    random = np.random.default_rng(0)
    chance = [(image_NN * text_NN[np.ix_(order, order)]).sum() for order in map(random.permutation, [400] * 200)]
    own = (image_NN * text_NN).sum()
    moved = [(image_NN * np.roll(text_NN, (shift, shift), (0, 1))).sum() for shift in range(-5, 6) if shift]
    assert own > np.mean(chance) + 10 * np.std(chance)
    assert max(moved) < np.mean(chance) + 4 * np.std(chance)
