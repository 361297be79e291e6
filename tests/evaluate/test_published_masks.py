"""Folders as VOC, ADE20K and COCO-Stuff publish them, made from real photos, through the command."""

import csv
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from segmentation_reference import reference_scores

from sail_align.align.segmentation import scaled_size
from sail_align.evaluate import cli
from sail_align.evaluate.models import Encoders
from sail_align.extract.sources.class_names import templates as published_templates

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOS.is_dir(), reason="the masked photos are not beside the repository"),
]
COUNT = 3
VOC_OF_COCO = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tv monitor"}
ADE_OF_COCO = {
    "tree-merged": "tree",
    "sky-other-merged": "sky",
    "wall-other-merged": "wall",
    "floor-other-merged": "floor",
    "dining table": "table",
    "grass-merged": "grass",
}


def labels_of(table):
    text = (resources.files("sail_align.data_manifests") / "classes" / f"{table}.tsv").read_text()
    return {row["name"]: int(row["label"]) for row in csv.DictReader(text.splitlines(), delimiter="\t")}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The same few photos in the three forms; masks hold what the forms hold for pixels of no class."""
    root = tmp_path_factory.mktemp("data")
    coco = yaml.safe_load((PHOTOS / "classes.yaml").read_text())["classes"]
    voc, ade, stuff = (labels_of(table) for table in ("voc-20", "ade20k-150", "coco-stuff-171"))
    forms = {
        "VOCdevkit/VOC2012": ("JPEGImages", "SegmentationClass", voc, VOC_OF_COCO, 0, 0),
        "ADEChallengeData2016": ("images/validation", "annotations/validation", ade, ADE_OF_COCO, 0, 0),
        "coco": ("val2017", "stuffthingmaps/val2017", stuff, {}, 1, 255),
    }
    chosen = [path.stem for path in sorted((PHOTOS / "masks").glob("*.png")) if holds(path, coco, voc)][:COUNT]
    for form, (images, masks, labels, renamed, offset, nothing) in forms.items():
        folder = root / form
        (folder / images).mkdir(parents=True)
        (folder / masks).mkdir(parents=True)
        table = np.full(256, nothing, dtype=np.uint8)
        for value, name in coco.items():
            if (name := renamed.get(name, name)) in labels:
                table[value] = labels[name] - offset
        for stem in chosen:
            (folder / images / f"{stem}.jpg").symlink_to(PHOTOS / "images" / f"{stem}.jpg")
            mask = Image.fromarray(table[np.array(Image.open(PHOTOS / "masks" / f"{stem}.png"))])
            if "VOC" in form:
                mask.putpalette([part for value in range(256) for part in (value, 0, 255 - value)])
            mask.save(folder / masks / f"{stem}.png")
    names = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    names.mkdir(parents=True)
    (names / "val.txt").write_text("".join(f"{stem}\n" for stem in chosen))
    return root


def holds(mask, coco, voc):
    """Whether two classes of VOC are in it."""
    there = {coco[value] for value in np.unique(np.array(Image.open(mask))).tolist()}
    return len({VOC_OF_COCO.get(name, name) for name in there} & set(voc)) >= 2


@pytest.fixture
def sail_eval(world, run, published, monkeypatch, capsys, tmp_path):
    """Call `sail-eval segmentation` on packaged manifests; return the records by data set, and what was printed."""
    monkeypatch.setattr("sail_align.align.runs.checkpoint.load_run", lambda path: run)
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0):
        arguments = ["segmentation", *arguments, "--data-root", str(published), "--run", str(run.path), "--quiet"]
        monkeypatch.setattr(sys, "argv", ["sail-eval", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        scores = run.path / "scores.json"
        return json.loads(scores.read_bytes())["records"] if scores.exists() else [], out + err

    return call


def test_packaged_manifests_score_the_published_forms(sail_eval):
    records, out = sail_eval("voc20", "voc20-authors", "voc21", "ade20k", "coco-stuff")
    found = {record["dataset"]: record for record in records}
    for name, classes in (("voc20", 20), ("voc21", 21), ("ade20k", 150), ("coco-stuff", 171)):
        assert found[name]["protocol"].startswith(f"segmentation/patch-cosine@2/{name}/")
        assert "/windows=448-by-224/" in found[name]["protocol"]
        assert f":{classes}:" in found[name]["protocol"]
        assert found[name]["metrics"][1]["chance"] == pytest.approx(100 / classes)
        assert found[name]["items"] == COUNT
        assert name in out
    assert "/normalisation=authors/classes=voc-20-authors:20:" in found["voc20-authors"]["protocol"]
    assert "/background=0.5/classes=voc-21:21:" in found["voc21"]["protocol"]
    assert set(found["voc21"]["details"]["iou"]) == {"background", *found["voc20"]["details"]["iou"]}


def test_variant_adds_a_record(sail_eval):
    sail_eval("voc20")
    records, _ = sail_eval("voc20", "--protocol", "whole-image")
    windows = [[part for part in record["protocol"].split("/") if "windows=" in part] for record in records]
    assert windows == [["windows=448-by-224"], ["windows=none"]]
    _, said = sail_eval("voc20", "--protocol", "sideways", code=2)
    assert "Protocol 'sideways' of voc20 is invalid" in said


def test_voc_miou_equals_a_plain_implementation(sail_eval, published, run):
    """From the files to the number without our windows, masks and metrics: mIoU by a loop over classes."""
    (record,), _ = sail_eval("voc20")
    names = {label: name for name, label in labels_of("voc-20").items()}
    templates = published_templates("open_clip:imagenet-80")
    encoders = Encoders(run)
    text, vision = encoders.text, encoders.image
    classes = []
    for label in sorted(names):
        prompts_PE = text.encode([template.replace("{}", names[label]) for template in templates]).half().double()
        classes.append((prompts_PE / prompts_PE.norm(dim=1, keepdim=True)).mean(0))
    classes_CE = torch.stack(classes) / torch.stack(classes).norm(dim=1, keepdim=True)
    confusion = np.zeros((20, 20))
    folder = published / "VOCdevkit/VOC2012"
    for name in (folder / "ImageSets/Segmentation/val.txt").read_text().split():
        image = Image.open(folder / "JPEGImages" / f"{name}.jpg").convert("RGB")
        mask = np.array(Image.open(folder / "SegmentationClass" / f"{name}.png")).astype(int)
        width, height = scaled_size(*image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))

        def scores(y, x, h, w, pixels=pixels):
            patches_hwE = vision.encode_dense(pixels[None, y : y + h, x : x + w])[0].double()
            return (patches_hwE / patches_hwE.norm(dim=-1, keepdim=True) @ classes_CE.T).permute(2, 0, 1)

        predicted = reference_scores(height, width, mask.shape, 4, scores).argmax(0).numpy()
        counted = (mask != 0) & (mask != 255)
        np.add.at(confusion, (mask[counted] - 1, predicted[counted]), 1)
    true, guessed = confusion.sum(1), confusion.sum(0)
    ious = {names[c + 1]: confusion[c, c] / (true[c] + guessed[c] - confusion[c, c]) for c in range(20) if true[c]}
    assert len(ious) >= 2
    assert record["details"]["iou"] == pytest.approx({name: 100 * iou for name, iou in ious.items()}, abs=0.02)
    assert record["metrics"][0]["value"] == pytest.approx(100 * np.mean(list(ious.values())), abs=0.02)
    assert record["metrics"][1]["value"] == pytest.approx(100 * np.trace(confusion) / confusion.sum(), abs=0.02)
