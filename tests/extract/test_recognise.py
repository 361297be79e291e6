"""`sail-extract init` and `run` on users' own data: what each path is recognised as, and what is asked."""

import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tars import write_tar

from sail_align.extract.build import build_store
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.recognise.columns import Choices, holds_captions, name_captions
from sail_align.extract.recognise.record import Recognised


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "png")
    return path


def write_csv(path: Path, *rows: list[str], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = options.pop("encoding", "utf-8")
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **options).writerows(rows)
    return path


def recognise(path: Path, **choices) -> Recognised:
    return Recognised.of(path, Choices(**choices))


def source_of(path: Path, **choices) -> dict:
    source = dict(recognise(path, **choices).content["source"])
    return {name: value for name, value in source.items() if name not in ("kind", "root")}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAIL_DATA_ROOT", raising=False)
    return tmp_path / "my data"


@pytest.fixture
def messy(data) -> Path:
    """A CSV as people have them: a BOM, semicolons, quotes, spaces, nested folders, upper case, missing values."""
    rows = [["ID", "Photo", "Photographer", "Caption", "Taken", "Web"]]
    for number in range(60):
        name = f"Trip {number % 3}/IMG {number}.{'JPG' if number % 2 else 'png'}"
        if number not in (7, 8):
            draw(data / "pictures" / name)
        text = "" if number == 5 else f'A "red" house;\nnumber {number}'
        rows.append([str(number), name, "Ann Lee", text, "2020-01-01 10:00", f"https://x.org/{number} a.jpg"])
    return write_csv(data / "captions.csv", *rows, delimiter=";", encoding="utf-8-sig")


def test_messy_csv(messy, typed):
    code, out, err = typed("init", "my data/captions.csv")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "my data/captions.csv: a CSV table of images in my data/pictures (kind: table)",
        "  60 images (2 missing), captions: raw (59)",
        "    Trip 0/IMG 0.png  raw: 'A \"red\" house; number 0'",
        "    Trip 1/IMG 1.JPG  raw: 'A \"red\" house; number 1'",
        "    Trip 2/IMG 2.png  raw: 'A \"red\" house; number 2'",
        "  columns not used: ID, Photographer, Taken.",
        "wrote my-data-captions.yaml",
        "Next: sail-extract run my-data-captions.yaml",
    ]
    manifest = Path("my-data-captions.yaml")
    assert yaml.safe_load(manifest.read_text()) == {
        "name": "my-data-captions",
        "source": {
            "kind": "table",
            "root": "my data",
            "files": "captions.csv",
            "images": "pictures",
            "image": "Photo",
            "captions": {"raw": "Caption"},
            "url": "Web",
        },
    }
    assert typed("check", str(manifest))[1].endswith("ready\n")
    assert source_of(messy.parent) == source_of(messy)  # the folder of the table


def test_rerun_uses_the_manifest_unless_it_differs(messy, typed):
    assert typed("init", "my data")[0] == 0
    manifest = Path("my-data.yaml")
    manifest.write_text(manifest.read_text().replace("# title: a description", "title: Our trips"))
    edited = manifest.read_text()
    assert "using my-data.yaml\n" in typed("init", "my data")[1]
    manifest.write_text(edited.replace("raw: Caption", "long: Caption"))
    code, _, err = typed("init", "my data")
    assert code == 2
    assert "my-data.yaml exists and differs from what my data looks like now: source.captions.long was 'Caption'" in err
    assert manifest.read_text() == edited.replace("raw: Caption", "long: Caption")
    manifest.write_text(edited)
    here = os.getcwd()
    os.chdir("..")  # from where the same folder has another relative path
    found = typed("init", f"{here}/my data", "--out", f"{here}/my-data.yaml")
    os.chdir(here)
    assert f"using {here}/my-data.yaml\n" in found[1]
    manifest.write_text(edited.replace("# task:", "task:"))
    assert Manifest.read(manifest).require_task().kind == "retrieval"
    manifest.write_text("name: [")
    assert "my-data.yaml is not valid YAML" in typed("init", "my data")[2]


def test_tables_of_another_encoding(data):
    draw(data / "a.png")
    table = write_csv(data / "t.csv", ["image", "légende"], ["a.png", "une forêt énorme"], encoding="cp1252")
    recognised = recognise(table)
    assert recognised.content["source"]["captions"] == {"raw": "légende"}
    assert recognised.content["source"]["encoding"] == "cp1252"
    assert recognised.lines[2:4] == [
        "    a.png  raw: 'une forêt énorme'",
        "  the table is not UTF-8 and is read as cp1252. If texts look wrong, set another `encoding` in the manifest.",
    ]
    table.write_bytes("image,légende\na.png,une forêt ".encode() + b"\xe9norme\n")
    recognised = recognise(table)  # damaged UTF-8
    assert "encoding" not in recognised.content["source"]
    assert recognised.lines[2] == "    a.png  raw: 'une forêt \ufffdnorme'"
    assert source_of(write_csv(table, ["image", "légende"], ["a.png", "une forêt"], encoding="utf-16"))


def test_several_captions_per_image(data):
    draw(data / "img/a.png"), draw(data / "img/b.png"), draw(data / "img/c.png")
    rows = [["a.png", "a red house"], ["a.png", "a house of bricks"], ["b.png", "a blue house"], ["c.png", "one cat"]]
    write_csv(data / "table.tsv", ["image", "text"], *rows, delimiter="\t")
    recognised = recognise(data / "table.tsv")
    assert recognised.content["source"]["captions"] == "text"
    assert recognised.content["encoders"] == {"captions": ["c0"]}  # only one image has a second one
    assert recognised.lines[1] == "  3 images, captions: c0 (3), c1 (1)"

    (data / "table.tsv").unlink()
    lines = [{"image": f"{name}.png", "texts": ["a red house", "a house"], "tags": ["x"], "ok": True} for name in "abc"]
    (data / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert source_of(data)["captions"] == "texts"
    pq.write_table(pa.Table.from_pylist(lines), data / "lists.parquet")
    assert source_of(data / "lists.parquet")["captions"] == "texts"
    with pytest.raises(
        UserError, match=r"several files that list images: lists\.jsonl, lists\.parquet\. Give the path"
    ):
        recognise(data)


def test_tables_in_parts_are_read_together(data):
    for number in range(2):
        draw(data / "pictures" / f"{number}.png")
        write_csv(data / "tables" / f"part-{number}.csv", ["image", "title"], [f"{number}.png", f"a house {number}"])
    recognised = recognise(data / "tables")
    assert recognised.content["source"]["files"] == ["part-0.csv", "part-1.csv"]
    assert recognised.content["source"]["images"] == "../pictures"
    assert recognised.lines[1] == "  2 images, captions: raw (2)"


TWO = [["a.png", "b.png", "a red house", "ein rotes Haus"]]


@pytest.mark.parametrize(
    ("header", "rows", "choices", "expected"),
    [
        (["left", "right", "note", "remark"], TWO, {}, "several columns that name images: left, right. Pass one of"),
        (
            ["left", "right", "note", "remark"],
            TWO,
            {"image_column": "right"},
            "several columns that may be captions: note",
        ),
        (
            ["left", "right", "note", "remark"],
            TWO,
            {"image_column": "right", "caption_columns": ("note", "remark")},
            {"image": "right", "captions": {"note": "note", "remark": "remark"}},
        ),
        (
            ["image", "thumb", "Title EN", "title_de"],
            TWO,
            {},
            {"captions": {"title-en": "Title EN", "title_de": "title_de"}},
        ),
        (["image", "thumb", "note", "title"], TWO, {}, {"image": "image", "captions": {"raw": "title"}}),
        (
            ["image", "thumb", "note", "title"],
            TWO,
            {"image_column": "photo"},
            "--image-column is invalid: .* no column 'photo'",
        ),
        (["image", "thumb", "note", "title"], TWO, {"caption_columns": ("text",)}, "has no column of texts 'text'"),
        (
            ["image", "thumb", "note", "title"],
            TWO,
            {"images": Path("nowhere")},
            "--images is invalid: nowhere is not a fold",
        ),
        (
            ["image", "note"],
            [["c.png", "a red house"]],
            {},
            "No image of column 'image' .* the first is 'c.png'. Pass the fo",
        ),
        (
            ["image", "note"],
            [["sub\\e.png", "a red house"]],
            {},
            "has backslashes in paths, such as 'sub\\\\\\\\e.png'",
        ),
        (
            ["image", "note"],
            [["A.PNG", "a red house"]],
            {},
            "in another case: 'A.PNG' is 'a.png' in .*my data. Correct",
        ),
        (["image", "note"], [["a", "a red house"]], {}, "names images without their ending: 'a' instead of 'a.png'"),
        (
            ["x", "note"],
            [["https://x/a.png", "a red house"]],
            {},
            "has addresses of images in column 'x'.* Download them",
        ),
        (
            ["a.png", "a red house"],
            [["b.png", "a house"]],
            {},
            "has no row of column names: it begins with 'a.png'. Add one",
        ),
        (
            ["image", "kind"],
            [["a.png", "cat"]],
            {},
            "No column of .* looks like captions. Its columns of texts are: kind",
        ),
        (["image", "note"], [], {}, "has no rows"),
        (
            ["image", "a", "b"],
            [["a.png", "x y", "z y"], ["a.png", "v w", "u v"]],
            {"caption_columns": ("a", "b")},
            "only one",
        ),
    ],
    ids=range(17),
)
def test_tables_that_leave_something_open(data, header, rows, choices, expected):
    for name in ("a.png", "b.png", "sub/e.png"):
        draw(data / name)
    table = write_csv(data / "table.csv", header, *rows)
    if isinstance(expected, dict):
        assert source_of(table, **choices).items() >= expected.items()
        return
    with pytest.raises(UserError, match=expected):
        recognise(table, **choices)


def test_images_elsewhere_are_named_by_their_path(data, tmp_path, typed):
    for name in "ab":
        draw(tmp_path / "far" / "away" / "disk" / f"{name}.png")
    write_csv(data / "t" / "table.csv", ["image", "text"], ["a.png", "a red house"], ["b.png", "a cat"])
    assert typed("init", "my data/t/table.csv")[0] == 2
    code, out, _ = typed("init", "my data/t/table.csv", "--images", "far/away/disk", "--out", "deep/here.yaml")
    assert code == 0
    assert "2 images, captions: raw (2)" in out
    assert typed("check", "deep/here.yaml")[0] == 0
    content = yaml.safe_load(Path("deep/here.yaml").read_text())
    assert (content["source"]["root"], content["source"]["images"]) == ("../my data/t", str(tmp_path / "far/away/disk"))


def test_absolute_paths_and_a_data_root(data, typed, monkeypatch):
    write_csv(data / "table.csv", ["path", "text"], [str(draw(data / "a.png")), "a red house"])
    monkeypatch.setenv("SAIL_DATA_ROOT", "/nowhere")
    assert typed("init", "my data")[0] == 0
    assert yaml.safe_load(Path("my-data.yaml").read_text())["source"]["root"] == str(data)
    assert typed("check", "my-data.yaml")[0] == 0


@pytest.mark.parametrize(
    ("files", "kind", "classes"),
    [
        (["cat/a.png", "dog_big/b.JPG"], "class-folder", {"cat": "cat", "dog_big": "dog big"}),
        (["n01440764/a.png", "n01443537/b.png"], "class-folder", "open_clip:imagenet"),
        (["2019/a.png", "2020-05/b.png"], "images", None),
        (["train/a.png", "test/b.png"], "images", None),
        (["a.png", "cat/a.png", "dog/b.png"], "images", None),
        (["cat/a.png", "dog/b.png", "dog/b.txt"], "images", None),
        (["cat/a.png", "dog/small/b.png"], "images", None),
        (["images/a.png"], "images", None),
        ([".hidden/a.png", "b"], "images", None),
    ],
    ids=range(9),
)
def test_folders_of_images(data, monkeypatch, files, kind, classes):
    for name in files:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        draw(data / name) if not name.endswith(".txt") else (data / name).write_text("a dog")
    monkeypatch.setattr("sail_align.extract.sources.class_folder.class_names", lambda name: ["x"] * 1_000)
    content = recognise(data).content
    assert (content["source"]["kind"], content["source"].get("classes")) == (kind, classes)
    assert content.get("task") == ({"kind": "classification"} if kind == "class-folder" else None)


def test_unrelated_tables_in_a_folder_of_images_are_named(data):
    draw(data / "a.png")
    (data / "broken.csv").write_text('x,y\n"a red')
    write_csv(data / "prices.csv", ["item", "price"], ["a chair", "3"])
    (data / "notes.json").write_text("[]")
    recognised = recognise(data)
    assert recognised.content["source"]["kind"] == "images"
    notes = [line for line in recognised.lines if "is not read" in line]
    assert [line.split(" is not read: ")[0] for line in notes] == ["  broken.csv", "  prices.csv"]
    assert "No column of" in notes[1]
    with pytest.raises(UserError, match=r"broken\.csv is invalid"):
        recognise(data, image_column="item")


def test_a_json_per_image_is_no_list_of_images(data):
    for number in range(10):
        draw(data / f"{number}.png")
        (data / f"{number}.json").write_text("{}")
    assert recognise(data).content["source"]["kind"] == "images"
    with pytest.raises(UserError, match=r"--images has no effect: .* has no table of images\. Omit it"):
        recognise(data, images=data)


def test_splits_of_class_folders_are_asked_for(data):
    for split in ("train", "val"):
        draw(data / split / "cat" / "a.png"), draw(data / split / "dog" / "a.png")
    with pytest.raises(
        UserError, match=r"has the splits train, val, each with .* Give the path of one, such as .*train"
    ):
        recognise(data)
    assert recognise(data / "val").content["name"] == "my-data-val"


def test_coco_and_karpathy(data):
    draw(data / "val2017" / "1.png"), draw(data / "val2017" / "2.png")
    images = [{"id": number, "file_name": f"{number}.png", "split": "test"} for number in (1, 2)]
    captions = [{"id": number, "image_id": 1 + number % 2, "caption": f"a house {number}"} for number in range(4)]
    (data / "annotations").mkdir()
    coco = data / "annotations" / "captions_val2017.json"
    coco.write_text(json.dumps({"images": images, "annotations": captions}))
    for path in (coco, data):
        recognised = recognise(path)
        assert recognised.content["source"]["images"] == "../val2017"
        assert recognised.lines[1] == "  2 images, captions: c0 (2), c1 (2)"
    for image in images:
        image |= {"filename": image["file_name"], "filepath": "val2017", "sentences": [{"raw": "a red house"}]}
    (data / "dataset.json").write_text(json.dumps({"images": images}))
    source = source_of(data / "dataset.json")
    assert source == {"annotations": "dataset.json", "images": ".", "split": "test"}
    coco.write_text(json.dumps({"images": images[:1], "annotations": [{"bbox": [1, 2]}]}))
    coco.write_text(coco.read_text().replace('"sentences"', '"x"'))
    with pytest.raises(UserError, match="has no captions in its 'annotations'"):
        recognise(coco)
    (data / "list.json").write_text("[1]")
    with pytest.raises(UserError, match=r"got a list, expected a JSON object; give a table"):
        recognise(data / "list.json")
    with pytest.raises(UserError, match=r"--image-column has no effect: .* has no columns\. Omit it"):
        recognise(data / "dataset.json", image_column="x")


def png() -> bytes:
    from io import BytesIO

    content = BytesIO()
    Image.new("RGB", (4, 4)).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize(
    ("members", "names", "expected"),
    [
        ({"0.png": png(), "0.txt": b"a red house"}, ["0.tar"], {"files": "0.tar", "captions": {"raw": "txt"}}),
        (
            {"0.jpg": png(), "0.json": b'{"caption": "a red house", "url": "http://x/y z", "exif": "a b", "w": 3}'},
            ["0.tar", "1.tar"],
            {"files": "*.tar", "captions": {"raw": "json:caption"}},
        ),
        (
            {"0.jpg": png(), "0.json": b'{"captions": ["a red house", "a house"]}'},
            ["a/0.tar", "b/0.tar"],
            {"files": "*/*.tar", "captions": "json:captions"},
        ),
        ({"0.mask.png": png(), "0.bmp": png()}, ["0.tar"], {"files": "0.tar", "images": ["bmp"], "captions": {}}),
        (
            {"0.jpg": png(), "0.cls": b"1"},
            ["test/0.tar"],
            {"files": "test/0.tar", "captions": {}, "classes": "classnames.txt"},
        ),
    ],
    ids=range(5),
)
def test_tars(data, members, names, expected):
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(data / name, members.items())
    (data / "classnames.txt").write_text("cat\ndog\n")
    assert source_of(data) == expected
    if len(names) == 1 and "/" not in names[0]:
        assert source_of(data / names[0]) == expected


@pytest.fixture
def hub(data, monkeypatch) -> Path:
    """A folder as it is downloaded from the hub, of two splits with images in parquet files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data.parent / "cache")
    feature = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (data / "data").mkdir(parents=True)
    for split, rows in (("train", 3), ("test", 2)):
        images = pa.array([{"bytes": png(), "path": None}] * rows, feature)
        texts = [[f"a red house {row}", f"one house {split}"] for row in range(rows)]
        info = {
            "image": {"_type": "Image"},
            "texts": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        }
        schema = pa.schema([("image", feature), ("texts", pa.list_(pa.string()))])
        metadata = {"huggingface": json.dumps({"info": {"features": info}})}
        table = pa.Table.from_arrays([images, pa.array(texts)], schema=schema.with_metadata(metadata))
        pq.write_table(table, data / "data" / f"{split}-00000-of-00001.parquet")
    return data


@pytest.mark.slow
def test_folders_of_the_hub(hub, typed):
    recognised = recognise(hub)
    source = recognised.content["source"]
    about = {"split": "train", "image": "image", "captions": "texts", "streaming": True}
    assert source == {"kind": "hugging-face", "root": str(hub), **about}
    assert not (hub.parent / "cache").exists() or not list((hub.parent / "cache").rglob("*.arrow"))  # no copy
    assert recognised.lines[1] == "  3 images, captions: c0 (3), c1 (3)"
    assert any(line.startswith("  splits: ") and "'train' is used" in line for line in recognised.lines)
    file = hub / "data" / "test-00000-of-00001.parquet"  # of a single split
    assert recognise(file).lines[1] == "  2 images, captions: c0 (2), c1 (2)"
    assert typed("init", str(file.relative_to(hub.parent)))[0] == 0
    assert typed("check", "test-00000-of-00001.yaml")[1].endswith("ready\n")


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])])
@pytest.mark.slow
def test_images_in_parquet_of_other_programs(data, monkeypatch, kind):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data.parent / "cache")
    data.mkdir()
    images = [png() if pa.types.is_binary(kind) else {"bytes": png(), "path": "a.png"}]
    images = [None, *images]
    texts = {"note": pa.array([b"not", b"an image"], pa.binary()), "caption": ["a red house", "a house"]}
    pq.write_table(pa.table({**texts, "jpg": pa.array(images, kind)}), data / "00000.parquet")
    source = recognise(data / "00000.parquet", image_column="jpg").content["source"]
    assert (source["image"], source["captions"]) == ("jpg", {"raw": "caption"})
    pq.write_table(pa.table({**texts, "image": ["a.png", "b.png"]}), data / "00000.parquet")
    draw(data / "a.png")
    assert recognise(data / "00000.parquet").content["source"]["kind"] == "table"


@pytest.mark.slow
def test_partial_downloads_of_the_hub(hub):
    info = {"features": [{"name": "image", "dtype": "image"}, {"name": "texts", "sequence": "string"}]}
    info["splits"] = [{"name": "train", "num_examples": 6, "num_bytes": 600}]
    files = [{"split": split, "path": f"data/{split}-*"} for split in ("train", "val")]
    for about in ({"dataset_info": info, "data_files": files[:1]}, {"data_files": files}):
        card = {"configs": [{"config_name": "default", "data_files": about.pop("data_files")}], **about}
        (hub / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        with pytest.raises(UserError, match=r"the splits of its card differ from its files .* Download the rest"):
            recognise(hub)
    assert recognise(hub / "data").lines[1] == "  3 images, captions: c0 (3), c1 (3)"


@pytest.mark.slow
def test_saved_data_sets(data, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {"img": [str(draw(data / f"{name}.png")) for name in "ab"], "kind": [0, 1]}
    names = datasets.ClassLabel(names=["cat", "dog"])
    table = datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image()).cast_column("kind", names)
    table.save_to_disk(data / "labelled")
    content = recognise(data / "labelled").content
    assert content["source"] == {
        "kind": "hugging-face",
        "root": str(data / "labelled"),
        "split": "train",
        "image": "img",
        "label": "kind",
    }
    assert content["task"] == {"kind": "classification"}
    table = table.add_column("title", ["a cat", "a dog"]).add_column("note", ["one cat", "one dog"])
    datasets.DatasetDict({"val": table}).save_to_disk(data / "captioned")
    source = source_of(data / "captioned")
    assert source == {"split": "val", "image": "img", "captions": {"raw": "title"}}
    assert source_of(data / "captioned", caption_columns=("note",))["captions"] == {"raw": "note"}
    with pytest.raises(UserError, match=r"--image-column is invalid: .* has images in the columns img"):
        recognise(data / "captioned", image_column="title")
    with pytest.raises(UserError, match=r"--images has no effect: the data set in .* has its images in a column"):
        recognise(data / "captioned", images=data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.zip", "", "x.zip is compressed (.zip). Unpack it, and give what it contains."),
        ("x.xlsx", "", "x.xlsx is a spreadsheet (.xlsx). Save it as CSV in UTF-8."),
        ("x.doc", "", "x.doc is of an unknown form: got the ending '.doc'. Give a folder of images"),
        ("x.csv", "", "Table x.csv cannot be read"),
        ("x.jsonl", "{}", "x.jsonl has no column of texts"),
        ("x.json", "{}", "x.json has an unknown form: got no list of 'images'"),
        ("x/a.heic", "no image", "x contains no images, tables or tars (1 .heic). Give a folder of images"),
        ("x/zarr.json", "{}", "x is a feature store, not a data set. See `sail-extract status x`."),
        ("nothing", None, "nothing is missing. Give a folder of images"),
        ("x.yaml", "", "x.yaml is a manifest. Give the path of the data instead."),
    ],
    ids=range(10),
)
def test_other_files(data, typed, name, content, message):
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    code, _, err = typed("init", name.split("/")[0])
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_unknown_encoders_are_refused_before_anything_is_written(messy, typed):
    code, _, err = typed("run", "my data", "--text-encoder", "minilm-16")
    assert (code, Path("features").exists()) == (2, False)
    assert "Unknown text encoder 'minilm-16'. Did you mean 'minilm-l6'?" in err


@pytest.mark.slow
def test_run_writes_the_manifest_beside_the_store_and_resumes(messy, typed, fake_encoders):
    code, out, _ = typed("run", "my data", "--text-encoder", "minilm-l6", "--quiet")
    assert code == 0
    assert Manifest.read(Path("features/my-data.yaml")).encoders.text == "minilm-l6"
    assert "wrote features/my-data.yaml\n" in out
    assert "image/fake-image: 1/1 shards, dim 4: 2 missing, 58 ok" in out
    assert out.endswith("Next: sail-align fit --features features/my-data.zarr\n")
    assert typed("check", "features/my-data.yaml")[1].endswith("ready\n")
    code, out, _ = typed("run", "my data", "--quiet")
    assert code == 0
    assert "using features/my-data.yaml\n" in out
    assert "0 rows encoded" in out
    assert "0 rows encoded" in typed("run", "features/my-data.yaml", "--quiet")[1]

    store = build_store(messy, out=Path("s") / "other.zarr", caption_columns="Caption,Photographer", quiet=True)
    assert store.captions == ("caption", "photographer")
    assert Manifest.read(Path("s/other.yaml")).name == "my-data-captions"
    for options, message in (
        ({"caption_columns": ["Nothing"]}, "--caption-columns is invalid"),
        ({"data_root": "x"}, "--data-root has no effect: .* is the path of the data"),
        ({"out": "s/other.zarr"}, r"s/other\.yaml exists and differs .*: source\.captions\.caption was 'Caption'"),
    ):
        with pytest.raises(UserError, match=message):
            build_store(messy, **options)
    with pytest.raises(UserError, match="--images has no effect: a manifest names its columns and folders"):
        build_store("s/other.yaml", images="x")


def test_other_commands_name_init(messy, typed):
    code, _, err = typed("check", "my data")
    assert (code, err) == (
        2,
        "error: my data is not a manifest. Make one with `sail-extract init 'my data'`, or give its data to "
        "`sail-extract run`.\n",
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a dog", None, ""], True),
        ([["a dog", "a cat"], None], True),
        (["dog", "cat"], False),
        (["2020-01-01 10:00", "2020-01-02 11:00"], False),
        (["https://x/a b", "https://x/c d"], False),
        (["一只狗在草地上奔跑", "一只猫在沙发上睡觉"], True),
        (["living room", "bath room"] * 50, False),
        ([None, ""], False),
        ([1, True], False),
    ],
)
def test_which_columns_hold_captions(values, expected):
    assert holds_captions(values) is expected


def test_names_of_captions():
    assert name_captions(["Any Column"]) == {"raw": "Any Column"}
    assert name_captions(["json:caption", "long.txt", "Long", "Ünï"]) == {
        "caption": "json:caption",
        "long": "long.txt",
        "long-2": "Long",
        "n": "Ünï",
    }


def test_links_are_followed_by_name(data):
    draw(data / "real" / "a.png")
    os.symlink(data / "real", data.parent / "photos")
    assert recognise(Path("photos")).content["source"]["root"] == str(data.parent / "photos")


def test_files_that_are_no_files_and_links_in_circles_are_not_opened(data):
    draw(data / "photos" / "a.jpg")
    for name in ("t.csv", "t.parquet", "t.tar", "t.json"):
        os.mkfifo(data / "photos" / name)
    (data / "photos" / "itself.jpg").symlink_to("itself.jpg")
    (data / "photos" / "itself").symlink_to("itself")
    (data / "photos" / "above").symlink_to("..")
    (data / "photos" / "root").symlink_to("/")
    draw(data / "elsewhere" / "b.jpg")
    recognised = recognise(data / "photos")
    assert recognised.content["source"]["kind"] == "images"
    assert "2 images (1 missing)" in recognised.lines[1]


def test_karpathy_paths_that_are_no_texts(data):
    images = [{"filename": "a.jpg", "filepath": 5, "split": "train", "sentences": [{"raw": "a cat"}]}]
    data.mkdir()
    (data / "k.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match=r"No image of .*the first is '5/a.jpg'"):
        recognise(data / "k.json")
