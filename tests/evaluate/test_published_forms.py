"""Data sets in their published form go through the tasks, with the real store and engine."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sail_align.evaluate.tasks.task import find_task

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def scores(world, name, source, task):
    data = world.open(world.manifest(name, source, task))
    result = find_task(task["kind"]).score(data)
    return result, {each["name"]: each["value"] for each in result.scores}


def square(colour):
    return Image.new("RGB", (20, 20), COLOURS[colour])


@pytest.fixture
def coco(world):
    """One folder of images under COCO's annotations and under Karpathy's, who has other images and more captions."""
    folder = world.folder / "coco"
    (folder / "val").mkdir(parents=True)
    images, annotations, karpathy = [], [], []
    for number, colour in enumerate(COLOURS):
        file = f"{number}.png"
        square(colour).save(folder / "val" / file)
        images.append({"id": number, "file_name": file})
        texts = [f"{colour} {i}" for i in range(6)]
        annotations += [{"id": 6 * number + i, "image_id": number, "caption": text} for i, text in enumerate(texts)]
        sentences = [{"raw": text} for text in texts]
        split = "test" if number < 2 else "val"
        karpathy.append({"filepath": "val", "filename": file, "split": split, "sentences": sentences})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    return {"root": ".", "images": "."}


@pytest.mark.slow
def test_coco_folder_gives_two_sets(world, coco):
    own = {**coco, "kind": "coco-captions", "annotations": "captions.json", "images": "val"}
    (world.folder / "coco-own").symlink_to(world.folder / "coco")
    result, values = scores(world, "coco-own", own, {"kind": "retrieval"})
    assert (result.items, result.details["captions"], values["t2i_r1"]) == (3, 15, 100)
    karpathy = {**coco, "kind": "karpathy", "annotations": "dataset_coco.json"}
    result, values = scores(world, "coco", karpathy, {"kind": "retrieval"})
    assert (result.items, result.details["captions"], values["i2t_r1"]) == (2, 12, 100)


def test_winoground_examples(world):
    folder = world.folder / "winoground"
    (folder / "images").mkdir(parents=True)
    lines = []
    for example, colours in enumerate([("red", "green"), ("blue", "red")]):
        for side, colour in enumerate(colours):
            square(colour).save(folder / "images" / f"ex_{example}_img_{side}.png")
        said = colours if example == 0 else colours[::-1]  # the second example's captions are swapped
        fields = {f"caption_{side}": said[side] for side in (0, 1)}
        fields |= {f"image_{side}": f"ex_{example}_img_{side}" for side in (0, 1)}
        lines.append(json.dumps({"id": example, "collapsed_tag": ["Object", "Both"][example], **fields}))
    (folder / "examples.jsonl").write_text("\n".join(lines))
    result, values = scores(world, "winoground", {"kind": "winoground"}, {"kind": "winoground"})
    assert values == {"text": 50, "image": 50, "group": 50}
    by_tag = result.details["by_tag"]
    assert {tag: (each["items"], each["group"][0]) for tag, each in by_tag.items()} == {
        "Object": (1, 100),
        "Both": (1, 0),
    }


def test_mmvp_pairs_count_only_if_both_statements_are_right(world):
    """Category by category, with the statements in the manifest's prompt."""
    folder = world.folder / "mmvp"
    pairs = [("Colour", "red", "green", "red", "green"), ("Colour", "blue", "red", "blue", "blue")]
    pairs += [("Count", "green", "blue", "blue", "green")]
    rows = ["Question ID,Type,Statement"]
    for number, (category, *colours, first, second) in enumerate(pairs):
        for side, (colour, statement) in enumerate(zip(colours, (first, second), strict=True)):
            path = folder / "MLLM_VLM Images" / category / f"{2 * number + side + 1}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            square(colour).save(path, quality=100)
            rows.append(f"{2 * number + side + 1},{category},{statement}")
    (folder / "Questions.csv").write_text("\n".join(rows))
    result, values = scores(world, "mmvp", {"kind": "mmvp"}, {"kind": "mmvp", "prompt": "a photo of {}"})
    assert result.items == 3
    assert values == {"pairs": pytest.approx(100 / 3)}
    by_category = result.details["by_category"]
    assert {name: (each["items"], each["pairs"][0]) for name, each in by_category.items()} == {
        "Colour": (2, 50.0),
        "Count": (1, 0.0),
    }
    assert result.scores[0]["chance"] == 25


def test_voc_palette_masks(world):
    folder = world.folder / "voc"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16], pixels[:, 16:] = COLOURS["red"], COLOURS["blue"]
    mask = np.full((32, 32), 3, dtype=np.uint8)  # labels from 1: red, green, blue
    mask[:, :16], mask[0], mask[:, 14:18] = 1, 255, 0
    Image.fromarray(pixels).save(folder / "images" / "2007_000033.png")
    painted = Image.fromarray(mask)
    painted.putpalette([value for i in range(256) for value in (i, 0, 255 - i)])
    painted.save(folder / "masks" / "2007_000033.png")
    (folder / "val.txt").write_text("2007_000033\n")
    source = {"kind": "mask-folder", "images": "images", "masks": "masks", "names": "val.txt", "ignored": [0, 255]}
    source["classes"] = {1: "red", 2: "green", 3: "blue"}
    _, values = scores(world, "voc", source, {"kind": "segmentation", "templates": ["{}"]})
    assert values == {"miou": 100, "pixel_accuracy": 100}


def test_clip_benchmark_tars_with_openai_templates(world):
    folder = world.folder / "wds_colours" / "test"
    folder.mkdir(parents=True)
    (folder.parent / "classnames.txt").write_text("\n".join(COLOURS))
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, colour in enumerate(["blue", "red", "green", "green"]):
            picture = io.BytesIO()
            square(colour).save(picture, "WEBP", lossless=True)
            label = str(list(COLOURS).index(colour)).encode()
            for ending, content in (("cls", label), ("webp", picture.getvalue())):
                member = tarfile.TarInfo(f"s{number:07}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = {"kind": "webdataset", "files": "test/*.tar", "classes": "classnames.txt"}
    task = {"kind": "classification", "templates": "open_clip:imagenet-7"}
    result, values = scores(world, "wds_colours", source, task)
    assert (result.items, values["top1"], values["mean_per_class"]) == (4, 100, 100)


@pytest.mark.slow
def test_imagenet_folders_and_variants(world, monkeypatch):
    """WordNet ids, some of them as in ImageNet-A and -R, and numbers as in ImageNet-V2, which sort in another order."""
    names = ["grey"] * 1000
    names[0], names[2], names[10] = "red", "green", "blue"  # tench, great white shark, brambling
    monkeypatch.setattr("sail_align.extract.sources.class_folder.class_names", lambda _: names)
    source = {"kind": "class-folder", "classes": "open_clip:imagenet"}
    task = {"kind": "classification", "templates": "open_clip:imagenet-80"}
    for name, folders in (("imagenet-a", ["n01440764", "n01484850", "n01530575"]), ("imagenet-v2", ["0", "2", "10"])):
        for folder, colour in zip(folders, COLOURS, strict=True):
            (world.folder / name / folder).mkdir(parents=True)
            square(colour).save(world.folder / name / folder / "x.JPEG", quality=100)
        data = world.open(world.manifest(name, source, task))
        result = find_task("classification").score(data)
        assert [each["value"] for each in result.scores] == [100, 100, 100]
        assert result.scores[0]["chance"] == pytest.approx(100 / 3)  # chosen among the classes that the set has
        assert find_task("classification").protocol_id(data) == (
            f"classification/prompt-ensemble@2/{name}/classes=open_clip:imagenet:3/templates=open_clip:imagenet-80"
        )


def test_published_names_may_repeat(world, monkeypatch):
    monkeypatch.setattr("sail_align.extract.sources.class_folder.class_names", lambda _: ["red", "red", "green"])
    for folder, colour in (("n01", "red"), ("n02", "red"), ("n03", "green")):
        (world.folder / "val" / folder).mkdir(parents=True)
        square(colour).save(world.folder / "val" / folder / "x.JPEG")
    source = {"kind": "class-folder", "classes": "open_clip:imagenet"}
    result, values = scores(world, "val", source, {"kind": "classification"})
    assert (result.details["classes"], result.details["distinct_class_names"]) == (3, 2)
    assert values["top1"] == pytest.approx(200 / 3)  # as with an argmax, the first of two of one name has both's images
    assert [example.right for example in result.examples] == [True, True, False]
