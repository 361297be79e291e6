"""Small data sets in their published forms."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sail_align.extract.data import IGNORED, Source
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources.class_folder import imagenet_ids
from sail_align.extract.sources.class_names import class_names, label_names, templates

CLASSES = Path(__file__).parents[2] / ".." / "shared" / "classes"


def opened(data_root: Path, **source) -> Source:
    fields = {"name": "made", "purpose": "train", "title": "Made", "licence": "none", "get": "made by a test"}
    return Manifest.model_validate({**fields, "source": source}).open_source(data_root)


def picture(path: Path, colour=(200, 30, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


@pytest.fixture
def coco(tmp_path):
    """Two images out of order, their captions interleaved, one with six."""
    images = [{"id": 9, "file_name": "000000000009.jpg", "coco_url": "http://images/9"}]
    images.append({"id": 4, "file_name": "000000000004.jpg"})
    captions = [(70, 9, "nine b "), (30, 9, "nine a"), (50, 4, "four a")]
    captions += [(80 + i, 9, f"nine {i}") for i in range(4)]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, image, text in captions]
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    for image in images:
        picture(tmp_path / "val2017" / image["file_name"])
    return tmp_path


def test_coco_keeps_five_captions_by_id(coco):
    source = opened(coco, kind="coco-captions", annotations="captions.json", images="val2017")
    four, nine = source.samples()
    assert source.captions == ("c0", "c1", "c2", "c3", "c4")
    assert (four.key, dict(four.captions)) == ("000000000004.jpg", {"c0": "four a"})
    assert list(nine.captions.values()) == ["nine a", "nine b", "nine 0", "nine 1", "nine 2"]
    assert nine.url == "http://images/9"
    assert source.image(nine.image).size == (8, 6)


def karpathy(root: Path, filepath: str | None) -> None:
    def image(name, split, captions):
        sentences = [{"raw": text, "tokens": text.split(), "imgid": 0, "sentid": 0} for text in captions]
        where = {"filepath": filepath} if filepath else {}
        picture(root / (filepath or "") / name)
        return {"filename": name, "split": split, "sentences": sentences, **where}

    images = [image("b.jpg", "test", ["one", "two", "three", "four", "five", "six"]), image("c.jpg", "restval", ["x"])]
    images.append(image("a.jpg", "test", ["uno", "due"]))
    (root / "dataset.json").write_text(json.dumps({"images": images, "dataset": "made"}))


@pytest.mark.parametrize(("filepath", "key"), [("val2014", "val2014/b.jpg"), (None, "b.jpg")])
def test_karpathy_keeps_all_captions_in_order(tmp_path, filepath, key):
    karpathy(tmp_path, filepath)
    source = opened(tmp_path, kind="karpathy", annotations="dataset.json", images=".", split="test")
    first, second = source.samples()
    assert source.captions == ("c0", "c1", "c2", "c3", "c4", "c5")
    assert first.key == key
    assert first.captions["c5"] == "six"
    assert list(second.captions) == ["c0", "c1"]
    assert source.image(first.image).mode == "RGB"


def test_rejects_unknown_split(tmp_path):
    karpathy(tmp_path, None)
    with pytest.raises(UserError, match=r"has no split 'tset'\. Its splits are restval, test"):
        list(opened(tmp_path, kind="karpathy", annotations="dataset.json", images=".", split="tset").samples())


def test_winoground_rows_are_pairs_by_id(tmp_path):
    lines = []
    for example in (1, 0):
        sides = {f"image_{side}": f"ex_{example}_img_{side}" for side in (0, 1)}
        message = {f"caption_{side}": f"caption {side} of {example}" for side in (0, 1)}
        tags = {"tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": ["Object", "Both"][example]}
        lines.append(json.dumps({"id": example, **sides, **message, **tags}))
        for side in (0, 1):
            picture(tmp_path / "images" / f"ex_{example}_img_{side}.png", colour=(example, side, 0))
    (tmp_path / "examples.jsonl").write_text("\n".join(lines) + "\n")
    source = opened(tmp_path, kind="winoground")
    samples = list(source.samples())
    assert [sample.key for sample in samples] == ["0/0", "0/1", "1/0", "1/1"]
    assert [sample.captions["raw"] for sample in samples[2:]] == ["caption 0 of 1", "caption 1 of 1"]
    assert [source.classes[sample.label] for sample in samples] == ["Object", "Object", "Both", "Both"]
    assert source.image(samples[3].image).getpixel((0, 0)) == (1, 1, 0)


def test_mmvp_pairs_are_in_folders_of_categories(tmp_path):
    categories = ["Camera Perspective", "Color"]
    with (tmp_path / "Questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Question ID", "Type", "Statement"])
        for question in range(1, 5):
            category = categories[(question - 1) // 2]
            table.writerow([question, category, f"a thing, {question}"])
            picture(tmp_path / "MLLM_VLM Images" / category / f"{question}.jpg")
    source = opened(tmp_path, kind="mmvp")
    samples = list(source.samples())
    assert [sample.image for sample in samples[1:3]] == ["Camera Perspective/2.jpg", "Color/3.jpg"]
    assert samples[2].captions == {"raw": "a thing, 3"}
    assert [source.classes[sample.label] for sample in samples] == [categories[0]] * 2 + [categories[1]] * 2
    assert source.image(samples[0].image).size == (8, 6)


@pytest.mark.parametrize(
    ("kind", "file", "content"),
    [
        ("coco-captions", "annotations", '{"images": [{"id": 1}], "annotations": []}'),
        ("karpathy", "annotations", '{"images": [{"filename": "a.jpg"}]}'),
        ("winoground", "examples", '{"id": 0, "image_0": "a", "caption_0": "b", "collapsed_tag": "Object"}'),
        ("winoground", "examples", "no JSON"),
        ("mmvp", "questions", "id,type\n1,Color\n2,Color\n"),
        ("mmvp", "questions", "id,type,statement\n1,Color,one\n"),
    ],
)
def test_rejects_annotations_of_another_form(tmp_path, kind, file, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "made.json").write_text(content)
    with pytest.raises(UserError, match=r"made\.json is not of the published form") as problem:
        list(opened(tmp_path, kind=kind, images="images", **{file: "made.json"}).samples())
    assert "\n" not in str(problem.value)


def masks(root: Path, values: list[list[int]], palette: bool = False) -> None:
    """Write one picture per row of `values`. Each pixel row of its mask equals that row."""
    for i, row in enumerate(values):
        picture(root / "images" / f"p{i}.jpg")
        mask = Image.fromarray(np.array([row] * 6, dtype=np.uint8))
        if palette:
            mask.putpalette([j for i in range(256) for j in (i, 255 - i, 0)])
        (root / "masks").mkdir(exist_ok=True)
        mask.save(root / "masks" / f"p{i}.png")


def test_ade20k_ignores_zero(tmp_path):
    masks(tmp_path, [[0, 1, 150], [3, 0, 0]])
    source = opened(tmp_path, kind="mask-folder", images="images", masks="masks", classes="ade20k-150", ignored=[0])
    samples = list(source.samples())
    assert [sample.key for sample in samples] == ["p0.jpg", "p1.jpg"]
    np.testing.assert_array_equal(source.mask(samples[0].mask)[0], [IGNORED, 0, 149])
    assert (len(source.classes), source.classes[0], source.classes[149]) == (150, "wall", "flag")


def test_voc_reads_palette_indices(tmp_path):
    masks(tmp_path, [[0, 1, 20], [255, 15, 0], [4, 4, 4]], palette=True)
    (tmp_path / "val.txt").write_text("p1\np0\n")
    fields = {"images": "images", "masks": "masks", "names": "val.txt", "ignored": [0, 255]}
    source = opened(tmp_path, kind="mask-folder", classes="voc-20", **fields)
    samples = list(source.samples())
    assert [sample.key for sample in samples] == ["p1.jpg", "p0.jpg"]
    np.testing.assert_array_equal(source.mask(samples[0].mask)[0], [IGNORED, 14, IGNORED])
    assert source.classes[14] == "person"
    authors = opened(tmp_path, kind="mask-folder", classes="voc-20-authors", **fields)
    changed = {a: b for a, b in zip(source.classes, authors.classes, strict=True) if a != b}
    assert changed == {
        "boat": "ship",
        "dining table": "table",
        "potted plant": "pottedplant",
        "tv monitor": "tvmonitor",
    }


def test_coco_stuff_shifts_labels(tmp_path):
    masks(tmp_path, [[0, 181, 255]])
    fields = {"images": "images", "masks": "masks", "classes": "coco-stuff-171", "label_offset": 1}
    source = opened(tmp_path, kind="mask-folder", ignored=[255], **fields)
    np.testing.assert_array_equal(source.mask("p0.png")[0], [0, 170, IGNORED])
    assert (source.classes[0], source.classes[170]) == ("person", "wood")


@pytest.mark.parametrize("value", [182, 11])
def test_rejects_masks_of_another_numbering(tmp_path, value):
    """182 is the unshifted label of wood; 11 is the label of street sign less one, which occurs in no mask."""
    masks(tmp_path, [[0, value, 255]])
    fields = {"images": "images", "masks": "masks", "classes": "coco-stuff-171", "label_offset": 1}
    with pytest.raises(UserError, match=f"contains the value {value}, which is neither a class nor ignored"):
        opened(tmp_path, kind="mask-folder", ignored=[255], **fields)


def test_suggests_the_label_offset_that_fits(tmp_path):
    """The first masks fit both numberings. 44 is the unshifted label of bottle; as a label less one it has no class."""
    masks(tmp_path, [[0, 1, 2], [0, 2, 0], [0, 44, 3]])
    fields = {"images": "images", "masks": "masks", "classes": "coco-stuff-171"}
    with pytest.raises(
        UserError, match=r"p2.png contains the value 44.* \(label_offset: 0 with ignored: \[0\] fits this mask\)"
    ):
        opened(tmp_path, kind="mask-folder", label_offset=1, ignored=[255], **fields)
    source = opened(tmp_path, kind="mask-folder", ignored=[0], **fields)
    np.testing.assert_array_equal(source.mask("p0.png")[0], [IGNORED, 0, 1])


def test_rejects_missing_listed_picture(tmp_path):
    masks(tmp_path, [[0, 1]])
    (tmp_path / "val.txt").write_text("p0\np7\n")
    with pytest.raises(UserError, match=r"images has no picture 'p7'\. The data set is incomplete"):
        opened(tmp_path, kind="mask-folder", images="images", masks="masks", names="val.txt", classes={0: "a", 1: "b"})


def test_listed_names_with_spaces_and_byte_order_mark(tmp_path):
    masks(tmp_path, [[0, 1]])
    for folder, ending in (("images", "jpg"), ("masks", "png")):
        (tmp_path / folder / f"p0.{ending}").rename(tmp_path / folder / f"my picture.{ending}")
    (tmp_path / "val.txt").write_text("my picture\r\n\n", encoding="utf-8-sig")
    fields = {"images": "images", "masks": "masks", "classes": {0: "a", 1: "b"}}
    (sample,) = opened(tmp_path, kind="mask-folder", names="val.txt", **fields).samples()
    assert sample.image == "my picture.jpg"


@pytest.mark.parametrize("fields", [{"label_offset": 1}, {"label_offset": -1}, {"ignored": [0]}, {"ignored": [255]}])
def test_rejects_class_without_possible_mask_value(tmp_path, fields):
    masks(tmp_path, [[0, 0]])
    with pytest.raises(
        UserError, match=r"Class '(first|last)' is invalid: its mask value would be (-1|0|255|256) \(label (0|255)\)"
    ):
        opened(
            tmp_path, kind="mask-folder", images="images", masks="masks", classes={0: "first", 255: "last"}, **fields
        )


def test_rejects_folder_without_images_unless_listed(tmp_path):
    """A store beside the classes would shift their labels."""
    for name in ("cat", "zebra"):
        picture(tmp_path / name / "0.jpg")
    assert opened(tmp_path, kind="class-folder").classes == ("cat", "zebra")
    (tmp_path / "features").mkdir()
    with pytest.raises(UserError, match="features contains no images"):
        opened(tmp_path, kind="class-folder")
    listed = opened(tmp_path, kind="class-folder", classes={"cat": "cat", "features": "trait", "zebra": "zebra"})
    assert [sample.label for sample in listed.samples()] == [0, 2]


def test_sorted_folders_get_published_names(tmp_path):
    for i in range(1000):
        (tmp_path / "val" / f"n{i:08}").mkdir(parents=True)
    picture(tmp_path / "val" / "n00000002" / "x.JPEG")
    source = opened(tmp_path, kind="class-folder", root="val", classes="open_clip:imagenet")
    (sample,) = source.samples()
    assert source.classes[sample.label] == "great white shark"
    (tmp_path / "val" / "another").mkdir()
    with pytest.raises(UserError, match="Got 1001 folders, but open_clip:imagenet names 1000 classes"):
        opened(tmp_path, kind="class-folder", root="val", classes="open_clip:imagenet")


def test_wordnet_ids_match_timm():
    from timm.data import ImageNetInfo

    assert imagenet_ids() == ImageNetInfo("imagenet-1k").label_names()


def test_folders_of_some_wordnet_ids(tmp_path):
    """ImageNet-A and -R have 200 of the 1,000 classes: labels count those, names stay the same."""
    for folder in ("n02119022", "n01498041", "n12267677"):
        picture(tmp_path / folder / "x.JPEG")
    source = opened(tmp_path, kind="class-folder", classes="open_clip:imagenet")
    assert source.classes == ("stingray", "red fox", "acorn")
    assert [(sample.key, sample.label) for sample in source.samples()][1] == ("n02119022/x.JPEG", 1)


def test_numbered_folders_sort_by_number(tmp_path):
    """ImageNet-V2's folders are 0 … 999: sorted as text, 10 would come before 2."""
    for folder in ("10", "2", "0", "999"):
        picture(tmp_path / folder / "x.jpeg")
    source = opened(tmp_path, kind="class-folder", classes="open_clip:imagenet")
    assert source.classes == ("tench", "great white shark", "brambling", "toilet paper")
    assert [sample.key for sample in source.samples()] == ["0/x.jpeg", "2/x.jpeg", "10/x.jpeg", "999/x.jpeg"]


def test_published_templates_have_one_placeholder():
    assert templates("open_clip:imagenet-80")[0] == "a bad photo of a {}."
    assert len(templates("open_clip:imagenet-80")) == 80
    assert all(template.count("{}") == 1 for template in templates("open_clip:imagenet-80"))
    assert len(templates("open_clip:imagenet-7")) == 7


def test_clip_benchmark_lists():
    pytest.importorskip("clip_benchmark", reason="clip-benchmark is not installed (extra eval)")
    assert templates("clip_benchmark:food101") == ["a photo of {}, a type of food."]
    assert len(class_names("clip_benchmark:pets")) == 37
    with pytest.raises(UserError, match="clip_benchmark has no 'fud101'"):
        templates("clip_benchmark:fud101")


@pytest.mark.parametrize("resolve", [class_names, templates])
@pytest.mark.parametrize("reference", ["open_clip:imagnet", "imagenet", "no_such:thing"])
def test_rejects_unknown_reference(resolve, reference):
    with pytest.raises(UserError, match=f"{reference}.*open_clip:imagenet.* or clip_benchmark:"):
        resolve(reference)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip.zero_shot_metadata", None)
    with pytest.raises(UserError, match=r"open_clip need a package: pip install 'sail-align\[eval\]'"):
        templates("open_clip:imagenet-80")


def test_rejects_unknown_table_of_labels():
    with pytest.raises(UserError, match=r"'ade20k'.*ade20k-150, coco-stuff-171, voc-20, voc-20-authors, voc-21"):
        label_names("ade20k")


@pytest.mark.skipif(not CLASSES.is_dir(), reason="the tables of class names are not beside the repository")
def test_coco_stuff_171_labels():
    with (CLASSES / "coco-stuff-182.tsv").open() as file:
        all_labels = {int(row["label"]): row["name"] for row in csv.DictReader(file, delimiter="\t")}
    absent = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    assert label_names("coco-stuff-171") == {label: all_labels[label] for label in all_labels if label not in absent}


PAIRED = {"kind": "mask-folder", "images": "both", "masks": "both", "classes": {1: "one"}}


@pytest.fixture
def both(tmp_path):
    """Three photos, each beside its mask in one folder."""
    masks(tmp_path, [[1], [1], [1]])
    folder = tmp_path / "both"
    folder.mkdir()
    for path in [*(tmp_path / "images").iterdir(), *(tmp_path / "masks").iterdir()]:
        path.rename(folder / path.name)
    return folder


def test_masks_beside_images_are_told_apart_by_kind(both):
    (both / "p0.json").write_text("{}")
    source = opened(both.parent, **PAIRED)
    assert [(sample.image, sample.mask) for sample in source.samples()] == [
        (f"p{i}.jpg", f"p{i}.png") for i in range(3)
    ]
    assert source.left_out == {".json": 1}


@pytest.mark.parametrize("shared", [True, False])
def test_two_photos_of_one_stem_are_an_error(both, shared):
    picture(both / "p1.webp")
    fields = PAIRED
    if not shared:
        (both.parent / "masks").rmdir()
        (both.parent / "masks").mkdir()
        for path in both.glob("*.png"):
            path.rename(both.parent / "masks" / path.name)
        picture(both / "p1.png")
        fields = {**PAIRED, "masks": "masks"}
    with pytest.raises(UserError, match=r"several pictures 'p1': p1\.jpg, (p1\.png, )?p1\.webp\. Keep one"):
        opened(both.parent, **fields)


def test_photos_without_a_mask_are_counted(both):
    (both / "p1.png").rename(both / "p1.PNG")
    (both / "p2.png").unlink()
    source = opened(both.parent, **PAIRED)
    assert [sample.mask for sample in source.samples()] == ["p0.png", "p1.PNG"]
    assert source.left_out == {"images without a mask": 1}
    (both.parent / "val.txt").write_text("p0\n")
    assert opened(both.parent, **PAIRED, names="val.txt").left_out == {}


def test_unreadable_list_or_mask_is_named(both):
    (both.parent / "val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"val\.txt cannot be read"):
        opened(both.parent, **PAIRED, names="val.txt")
    (both / "p0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(UserError, match=r"A mask cannot be read: .*p0\.png"):
        opened(both.parent, **PAIRED)
