"""Each protocol on squares whose right answers are known, with the real store and engine."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sail_align.evaluate import segmenter
from sail_align.evaluate.tasks import retrieval, segmentation
from sail_align.evaluate.tasks.task import all_tasks, find_task
from sail_align.extract.errors import UserError


def evaluate(data):
    return find_task(data.task.kind).score(data)


def values(result):
    return {each["name"]: each["value"] / (100 if each["unit"] == "%" else 1) for each in result.scores}


def chances(result):
    return {each["name"]: each["chance"] / 100 for each in result.scores}


def test_classification_predicts_the_closest_class(world):
    squares = [("red", "red"), ("red", "pink"), ("green", "green"), ("yellow", "yellow")]  # pink is closest to red
    result = evaluate(world.open(world.class_folders("colours", squares, {"kind": "classification"})))
    assert values(result) == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0}


def test_classification_errors_and_chance(world):
    squares = [("red", "blue"), ("red", "red"), ("green", "green"), ("blue", "blue")]  # a blue square called red
    result = evaluate(world.open(world.class_folders("colours", squares, {"kind": "classification"})))
    assert values(result) == {"top1": 0.75, "top5": 1.0, "mean_per_class": pytest.approx((0.5 + 1 + 1) / 3)}
    assert chances(result) == pytest.approx({"top1": 1 / 3, "top5": 1.0, "mean_per_class": 1 / 3})
    assert sorted(example.right for example in result.examples) == [False, True, True, True]


def test_class_embeddings_average_unit_vectors(world):
    task = {"kind": "classification", "templates": ["{}", "{} red"]}
    data = world.open(world.class_folders("colours", [("green", "green"), ("blue", "blue")], task))
    for row, (r, g, b) in zip(data.class_embeddings(), [(-1, -1, 1), (-1, 1, -1)], strict=True):  # blue before green
        plain = np.array([r, g, b]) / np.sqrt(3)
        with_red = np.array([r + 1, g - 1, b - 1]) / np.linalg.norm([r + 1, g - 1, b - 1])
        mean = (plain + with_red) / 2
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)


def test_retrieval_accepts_any_caption_of_an_image(world):
    rows = [("red", ["red", "cyan"]), ("green", ["green"]), ("blue", ["blue"])]  # cyan is closer to both others
    result = evaluate(world.open(world.squares("caps", rows, {"kind": "retrieval"}, captions="caption")))
    assert values(result)["i2t_r1"] == 1.0
    assert values(result)["t2i_r1"] == 3 / 4
    assert values(result)["t2i_r5"] == 1.0
    assert chances(result)["t2i_r1"] == pytest.approx(1 / 3)
    assert chances(result)["i2t_r1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert result.details == {"captions": 4}


@pytest.mark.slow
def test_retrieval_uses_only_the_named_captions(world):
    rows = [("red", ["red", "cyan"]), ("green", ["green"]), ("blue", ["blue"])]
    manifest = world.squares("caps", rows, {"kind": "retrieval", "captions": ["c0"]}, captions="caption")
    assert values(evaluate(world.open(manifest)))["t2i_r1"] == 1.0


def test_recall_interval_equals_a_loop():
    """Images are resampled with all their captions."""
    generator = np.random.default_rng(3)
    owner = generator.integers(0, 40, 150)
    text_ranks, image_ranks = generator.integers(0, 20, 150), generator.integers(0, 20, 40)
    outcomes = {"image_rank": image_ranks, "text_rank": text_ranks, "owner": owner}
    metrics = {each["name"]: each for each in retrieval.TASK.compute_scores(outcomes, 40)}
    metric = metrics["t2i_r5"]
    assert metric["value"] == pytest.approx(100 * sum(rank < 5 for rank in text_ranks) / 150)
    draws = np.random.default_rng(0)
    recalls = []
    for _ in range(1000):
        ranks = [rank for image in draws.integers(40, size=40) for rank in text_ranks[owner == image]]
        recalls.append(sum(rank < 5 for rank in ranks) / len(ranks))
    assert metric["interval"] == pytest.approx(tuple(100 * np.percentile(recalls, [2.5, 97.5])))
    assert metrics["t2i_median_rank"]["value"] == np.median(text_ranks) + 1
    assert metrics["t2i_mean_rank"]["value"] == pytest.approx(np.mean(text_ranks) + 1)
    asking = [image_ranks[image] for image in range(40) if image in owner]
    assert metrics["i2t_median_rank"]["value"] == np.median(asking) + 1


def test_winoground_reads_rows_in_pairs(world):
    rows = [
        *[("red", "red"), ("green", "green")],  # both right
        *[("red", "green"), ("green", "red")],  # both wrong
        *[("red", "red"), ("red", "green")],  # equal images: ties, so neither
        *[("red", "red"), ("pink", "cyan")],  # pink prefers red to cyan, cyan pink to red: only image right
    ]
    result = evaluate(world.open(world.squares("pairs", rows, {"kind": "winoground"})))
    assert result.items == 4
    assert values(result) == {"text": 0.25, "image": 0.5, "group": 0.25}


def test_winoground_rejects_an_odd_number_of_rows(world):
    manifest = world.squares("pairs", [("red", "red")] * 3, {"kind": "winoground"})
    with pytest.raises(UserError, match="pairs has 3 images and 3 captions"):
        evaluate(world.open(manifest))


def test_segmentation_of_two_halves_is_exact(world):
    result = evaluate(world.open(world.halves("seg", [("red", "green"), ("blue", "yellow")], {"kind": "segmentation"})))
    assert values(result)["pixel_accuracy"] == 1.0
    assert values(result)["miou"] == 1.0
    assert chances(result) == pytest.approx({"pixel_accuracy": 1 / 6, "miou": 0.25 / (6 * 0.25 + 0.75)})
    assert set(result.details["iou"]) == {"red", "green", "blue", "yellow"}


def test_improbable_pixels_are_background(world, tmp_path):
    """A grey half is as far from one colour as from another."""
    task = {"kind": "segmentation", "background": 0.5}
    manifest = world.halves("seg", [("red", "green")], task)
    manifest.write_text(manifest.read_text().replace("5: cyan", "5: cyan\n    6: background"))
    for folder, colour in (("images", (128, 128, 128)), ("masks", 6)):
        path = tmp_path / "seg" / folder / "000.png"
        picture = Image.open(path)
        picture.paste(colour, (16, 0, 32, 32))
        picture.save(path)
    result = evaluate(world.open(manifest))
    assert "/background=0.5/" in find_task("segmentation").protocol_id(world.open(manifest))
    assert set(result.details["iou"]) == {"red", "background"}
    assert values(result)["pixel_accuracy"] > 0.9  # but for the border between the halves
    manifest.write_text(manifest.read_text().replace("6: background", "6: cyan blue"))
    with pytest.raises(UserError, match="seg has a background threshold, but no class 'background'"):
        evaluate(world.open(manifest))


@pytest.mark.parametrize("size", [(60, 30), (30, 60)])
def test_whole_image_and_windows_agree(world, size, tmp_path):
    """Patches of this encoder see nothing but themselves, so that windows only average what is equal."""
    for name, variants in (("448-by-224", []), ("none", ["whole-image"])):
        manifest = world.halves(name, [("red", "green")], {"kind": "segmentation", "variants": variants})
        for folder in ("images", "masks"):
            path = tmp_path / name / folder / "000.png"
            Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)
        data = world.open(manifest)
        assert f"/windows={name}/" in find_task("segmentation").protocol_id(data)
        assert values(evaluate(data)) == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_variants_reach_the_encoder_and_the_protocol_id(world, monkeypatch):
    task = {"kind": "segmentation", "variants": ["maskclip", "authors-normalisation"]}
    data = world.open(world.halves("seg", [("red", "green")], task))
    encoder, seen = data.encoders.image, []

    def encode_dense(pixels_BHWC, **options):
        seen.append(options)
        return type(encoder).encode_dense(encoder, pixels_BHWC)

    monkeypatch.setattr(encoder, "encode_dense", encode_dense)
    evaluate(data)
    assert "/last-attention=none/normalisation=authors/" in find_task("segmentation").protocol_id(data)
    assert [options["last_attention"] for options in seen] == [False]
    assert [255 * mean for mean in seen[0]["normalisation"].mean] == pytest.approx([122.771, 116.746, 104.094])
    assert [255 * std for std in seen[0]["normalisation"].std] == pytest.approx([68.501, 66.632, 70.323])


def test_examples_are_segmented_once_and_sorted(world, monkeypatch):
    calls = []
    label = segmenter.Segmenter.label
    monkeypatch.setattr(
        segmenter.Segmenter, "label", lambda self, *given: calls.append(given[0].key) or label(self, *given)
    )
    pairs = [("red", "green")] * 3 + [("blue", "pink")] * 4
    manifest = world.halves("seg", pairs, {"kind": "segmentation"})
    path = world.folder / "seg" / "images" / "001.png"
    Image.new("RGB", (32, 32), (255, 0, 0)).save(path)  # half of it is called red where the mask says green
    result = evaluate(world.open(manifest))
    assert len(calls) == len(pairs)
    assert [example.title for example in result.examples] == ["pixel accuracy 100.0"] * 4 + ["pixel accuracy 50.0"]


def test_segmentation_scores_use_the_total_confusion(world):
    """mIoU, accuracy and their intervals once more, by a loop over classes and draws."""
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 4, (2, 30, 50))
    confusion_NCC = np.zeros((30, 5, 5))  # the fifth class is neither true nor predicted
    for image in range(30):
        for true, guess in zip(truth[image], predicted[image], strict=True):
            confusion_NCC[image, true, guess] += 1
    counts = [np.diagonal(confusion_NCC, axis1=1, axis2=2), confusion_NCC.sum(2), confusion_NCC.sum(1)]
    outcomes = dict(zip(("hits", "truth", "predicted"), counts, strict=True))
    metrics = segmentation.TASK.compute_scores(outcomes, 30)

    def miou(rows):
        total = confusion_NCC[rows].sum(0)
        ious = [total[c, c] / (total[c].sum() + total[:, c].sum() - total[c, c]) for c in range(4)]
        return 100 * sum(ious) / 4

    assert metrics[0]["value"] == pytest.approx(miou(np.arange(30)))
    draws = np.random.default_rng(0)
    mious = [miou(draws.integers(30, size=30)) for _ in range(1000)]
    assert metrics[0]["interval"] == pytest.approx(tuple(np.percentile(mious, [2.5, 97.5])))
    assert metrics[1]["value"] == pytest.approx(100 * (truth == predicted).mean())


def test_unreadable_mask_is_named(world, tmp_path):
    manifest = world.halves("seg", [("red", "green")], {"kind": "segmentation"})
    (tmp_path / "seg" / "masks" / "000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"Mask '000.png' of seg cannot be read"):
        evaluate(world.open(manifest))


def test_unknown_mask_value_is_rejected(world, tmp_path):
    data = world.open(world.halves("seg", [("red", "green")], {"kind": "segmentation"}))
    data.source.mask = lambda _: np.full((32, 32), 6, dtype=np.uint8)
    with pytest.raises(
        UserError, match=r"Mask '000.png' of seg is invalid: got the value 6, expected one of 6 classes"
    ):
        evaluate(data)


def test_mask_of_another_shape_is_rejected(world, tmp_path):
    """Such as that of a photo whose EXIF data turn it."""
    manifest = world.halves("seg", [("red", "green")], {"kind": "segmentation"})
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    Image.new("RGB", (32, 16), "red").save(tmp_path / "seg" / "images" / "000.png", exif=turned)
    Image.new("L", (32, 16)).save(tmp_path / "seg" / "masks" / "000.png")
    with pytest.raises(UserError, match=r"Mask '000.png' of seg has 32 × 16 pixels, but its picture 16 × 32"):
        evaluate(world.open(manifest))
    Image.new("L", (8, 16)).save(tmp_path / "seg" / "masks" / "000.png")  # half the size is no fault
    assert values(evaluate(world.open(manifest)))["miou"] == 1.0


def test_masks_without_classes_are_rejected(world, tmp_path):
    manifest = world.halves("seg", [("red", "green")], {"kind": "segmentation"})
    Image.new("L", (32, 32), 255).save(tmp_path / "seg" / "masks" / "000.png")
    with pytest.raises(UserError, match="No mask of seg has a pixel of a listed class"):
        evaluate(world.open(manifest))


@pytest.mark.parametrize("kind", all_tasks())
def test_set_without_samples_is_rejected(world, kind):
    manifest = world.squares("none", [], {"kind": kind}, masks="images", classes={0: "red"})
    with pytest.raises(UserError, match="none has no samples"):
        evaluate(world.open(manifest))


def test_second_evaluation_loads_no_encoder(world, loaded):
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], {"kind": "classification"})
    first = evaluate(world.open(manifest))
    assert loaded == ["text", "image"] or loaded == ["image", "text"]
    loaded.clear()
    assert evaluate(world.open(manifest)).scores == first.scores
    assert loaded == []


@pytest.mark.slow
def test_features_are_shared_between_heads_but_not_poolings(world, run, loaded):
    manifest = world.squares("caps", [("red", "red"), ("green", "green")], {"kind": "retrieval"})
    evaluate(world.open(manifest))
    loaded.clear()
    second = replace(run, digest="e" * 64, model=type(run.model)())
    evaluate(world.open(manifest, second))
    assert loaded == []
    pooled = replace(run, image=replace(run.image, spec=replace(run.image.spec, pooling="cls")))
    with suppress(UserError):  # the stand-in encoder is not the one that was asked for
        evaluate(world.open(manifest, pooled))
    assert loaded == ["image"]
    pooled = replace(run, text=replace(run.text, spec=replace(run.text.spec, pooling="cls")))
    loaded.clear()
    with suppress(UserError):
        evaluate(world.open(manifest, pooled))
    assert loaded == ["text"]


@pytest.mark.slow
def test_stopped_encoding_is_completed(world, loaded):
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], {"kind": "classification"})
    data = world.open(manifest)
    evaluate(data)
    data.stores["images"].image().discard(0)
    loaded.clear()
    evaluate(world.open(manifest))
    assert loaded == ["image"]


def test_store_of_other_samples_is_rejected(world, tmp_path):
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], {"kind": "classification"})
    evaluate(world.open(manifest))
    Image.new("RGB", (4, 4)).save(tmp_path / "colours" / "green" / "new.png")
    with pytest.raises(UserError, match="has other samples than colours now"):
        evaluate(world.open(manifest))


@pytest.mark.slow
def test_templates_have_separate_stores(world):
    task = {"kind": "classification"}
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], task)
    first = world.open(manifest)
    evaluate(first)
    manifest.write_text(manifest.read_text().replace("task:", "task:\n  templates: ['{} red']"))
    second = world.open(manifest)
    evaluate(second)
    assert first.stores["prompts"].path != second.stores["prompts"].path
    assert first.stores["images"].path == second.stores["images"].path


@pytest.mark.slow
def test_folders_have_separate_image_stores(world, tmp_path):
    manifest = world.class_folders("here", [("red", "red"), ("green", "green")], {"kind": "classification"})
    assert values(evaluate(world.open(manifest)))["top1"] == 1.0
    world.class_folders("there", [("red", "green"), ("green", "red")], {"kind": "classification"})
    moved = tmp_path / "there" / "manifest.yaml"
    moved.write_text(manifest.read_text())
    assert values(evaluate(world.open(moved)))["top1"] == 0.0


def test_duplicate_class_names_are_rejected(world):
    manifest = world.halves("seg", [("red", "green")], {"kind": "segmentation"})
    manifest.write_text(manifest.read_text().replace("1: green", "1: red"))
    with pytest.raises(UserError, match="seg has two classes named 'red'"):
        evaluate(world.open(manifest))


def test_store_of_another_encoder_is_rejected(world, run, tmp_path):
    """Folder names carry fingerprints; a store moved under another's name is still found out."""
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], {"kind": "classification"})
    data = world.open(manifest)
    evaluate(data)
    other = replace(run, image=replace(run.image, spec=replace(run.image.spec, weights="1")))
    path = data.stores["images"].path
    fingerprint, another = (each.image.spec.fingerprint[:8] for each in (run, other))
    path.rename(path.with_name(path.name.replace(fingerprint, another)))
    with pytest.raises(UserError, match="weights '0', got '1'"):
        evaluate(world.open(manifest, other))


@pytest.mark.slow
def test_unreadable_image_is_named_and_retried(world, tmp_path):
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], {"kind": "classification"})
    picture = tmp_path / "colours" / "red" / "0.png"
    good = picture.read_bytes()
    picture.write_bytes(good[:40])
    with pytest.raises(UserError, match=r"1 of 2 images of colours cannot be used. The first is 'red/0.png'"):
        evaluate(world.open(manifest))
    picture.write_bytes(good)
    assert values(evaluate(world.open(manifest)))["top1"] == 1.0


def test_diverged_head_is_rejected(world, run):
    manifest = world.class_folders("colours", [("red", "red"), ("green", "green")], {"kind": "classification"})
    run.model.encode_image = lambda features_BD: features_BD * float("nan")
    with pytest.raises(UserError, match="Its training has diverged"):
        evaluate(world.open(manifest))


def test_unknown_caption_is_named(world):
    manifest = world.squares("caps", [("red", "red")], {"kind": "retrieval", "captions": ["long"]})
    with pytest.raises(UserError, match=r"caps has no caption 'long', only raw"):
        evaluate(world.open(manifest))


def test_image_without_caption_is_not_a_query():
    """Ranks as `align.metrics.ranks` gives them: the image that owns no text ranks last."""
    outcomes = {"image_rank": np.array([0, 0, 2]), "text_rank": np.array([0, 1]), "owner": np.array([0, 1])}
    metrics = {each["name"]: each for each in retrieval.TASK.compute_scores(outcomes, 3)}
    assert metrics["i2t_r1"]["value"] == 100.0
    assert metrics["t2i_r1"]["value"] == 50.0
    assert metrics["t2i_r1"]["chance"] == pytest.approx(100 / 3)
    assert metrics["i2t_r1"]["chance"] == pytest.approx(100 / 2)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("segmentation", "words has rows without a mask"),
        ("winoground", "words has 2 captions per row. Name one"),
    ],
)
def test_unsuitable_set_is_rejected(world, kind, sentence):
    manifest = world.squares("words", [("red", ["red", "pink"])] * 2, {"kind": kind}, captions="caption")
    with pytest.raises(UserError, match=sentence):
        evaluate(world.open(manifest))


def test_classification_needs_labels(world):
    manifest = world.halves("seg", [("red", "green")], {"kind": "classification"})
    with pytest.raises(UserError, match="seg has rows without a label"):
        evaluate(world.open(manifest))


def test_retrieval_needs_captions(world):
    manifest = world.class_folders("colours", [("red", "red")], {"kind": "retrieval"})
    with pytest.raises(UserError, match="colours has no captions"):
        evaluate(world.open(manifest))
