"""A world of coloured squares whose encoders are known exactly: an image's feature is its mean colour, a text's the
colour that it names, and a run's heads change nothing but the length.
"""

import csv
import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from sail_align.align.runs.checkpoint import Run
from sail_align.align.settings import FitSettings
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.models import Encoders
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.encoders.preprocessing import pad_to_multiple
from sail_align.extract.manifest import find_manifest

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
    "cyan": (0, 255, 255),
}


def identity(modality, weights="0"):
    of_images = {"crop": 16, "resize": None, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    preprocessing = of_images if modality == "image" else {"prefix": "", "token_limit": 8}
    source = {"loader": "test"}
    spec = EncoderSpec(f"colour-{modality}", modality, source, weights, preprocessing, "mean", "float32", 3)
    return Identity(spec, [1.0, 2.0, 3.0], {"torch": "x"})


class ColourVision:
    """Features are mean colours in [−1, 1]; patches of 4 × 4 pixels."""

    stride, size, batch_size, min_jpeg_side = 4, 16, 32, 0
    pixel_shape = (16, 16, 3)
    identity = identity("image")

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.resize((self.size, self.size))))

    def encode(self, pixels_BHWC):
        return (pixels_BHWC / 127.5 - 1).mean(dim=(1, 2))

    def encode_dense(self, pixels_BHWC, *, normalisation=None, last_attention=True):
        pixels_BCHW = pad_to_multiple(pixels_BHWC.permute(0, 3, 1, 2) / 127.5 - 1, self.stride)
        return F.avg_pool2d(pixels_BCHW, self.stride).permute(0, 2, 3, 1)


class ColourText:
    """A text's feature is the mean of the colours that it names, or a colour of its own if it names none."""

    identity = identity("text")

    def encode(self, texts, advance=lambda done: None):
        advance(len(texts))
        named = [[COLOURS[word] for word in text.replace(".", "").split() if word in COLOURS] for text in texts]
        rgb = [
            colours or [tuple(sha256(text.encode()).digest()[:3])] for text, colours in zip(texts, named, strict=True)
        ]
        return torch.stack([torch.tensor(colours).float().mean(dim=0) / 127.5 - 1 for colours in rgb])


class PlainHeads(torch.nn.Module):
    """Heads that only normalise."""

    def __init__(self):
        super().__init__()
        self.correction = None

    def encode_image(self, features_BD):
        return F.normalize(features_BD, dim=-1)

    encode_text = encode_patches = encode_image


@pytest.fixture
def loaded(monkeypatch):
    """Make `load_recorded` give the colour encoders; return the list of what was loaded."""
    loads = []

    def load(recorded, device="cpu", **options):
        loads.append(recorded.spec.modality)
        return ColourVision() if recorded.spec.modality == "image" else ColourText()

    monkeypatch.setattr("sail_align.evaluate.models.load_recorded", load)
    return loads


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "colours-linear"
    folder.mkdir(parents=True)
    settings = asdict(FitSettings(head="linear", dim=3, steps=9))
    settings |= {"captions": ["raw"], "stores": ["colours.zarr"], "store_digests": ["c" * 64]}
    settings |= {"training_rows": 1234, "held_out_rows": 56}
    (folder / "settings.json").write_text(json.dumps(settings))
    return Run(folder, PlainHeads(), ColourVision.identity, ColourText.identity, settings, "d" * 64)


@pytest.fixture
def scored(world, run):
    """Score the run on a set of each kind that has something to look at, and give it curves; return its folder."""
    folders = [("red", "red"), ("green", "green"), ("blue", "red")]
    captions = [("red", "red <b>&"), ("green", "green"), ("blue", "blue")]
    manifests = [
        world.class_folders("squares", folders, {"kind": "classification"}),
        world.squares("caps", captions, {"kind": "retrieval"}),
        world.squares("pairs", [("red", "red"), ("green", "green")], {"kind": "winoground"}),
        world.halves("halves", [("red", "green")], {"kind": "segmentation"}),
    ]
    steps = [{"kind": "train", "step": step, "loss": 5 / (1 + step)} for step in range(10)]
    heldout = [{"kind": "heldout", "step": step, "loss": 1.0, "t2i_r1": 9.0 * step, "i2t_r1": 8.0} for step in (0, 9)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + heldout))
    sets = [find_manifest(str(path)) for path in manifests]
    for record in evaluate_sets(run, sets, features=world.folder / "features", quiet=True):
        assert "error" not in record
    return run.path


@pytest.fixture
def world(tmp_path, loaded, run):
    """Makes evaluation sets of coloured squares on disk, and opens them as a run sees them."""
    return World(tmp_path, run)


class World:
    def __init__(self, folder: Path, run: Run):
        self.folder = folder
        self.run = run

    def squares(self, name, rows, task, **source):
        """Write a manifest with one image a row of (colour, caption); return its path."""
        root = self.folder / name
        (root / "images").mkdir(parents=True)
        with (root / "captions.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "caption"])
            for number, (colour, caption) in enumerate(rows):
                Image.new("RGB", (20, 20), COLOURS[colour]).save(root / "images" / f"{number:03d}.png")
                for text in [caption] if isinstance(caption, str) else caption:
                    table.writerow([f"{number:03d}.png", text])
        described = {"kind": "table", "files": "captions.csv", "images": "images", "captions": {"raw": "caption"}}
        return self.manifest(name, {**described, **source}, task)

    def class_folders(self, name, colours, task):
        """Write a manifest of a folder of squares by class; return its path."""
        for label, colour in colours:
            folder = self.folder / name / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), COLOURS[colour]).save(folder / f"{len(list(folder.iterdir()))}.png")
        return self.manifest(name, {"kind": "class-folder"}, task)

    def halves(self, name, pairs, task):
        """Write a manifest of images with a left and a right colour, and masks of them; return its path."""
        names = list(COLOURS)
        path = self.squares(
            name, [(left, left) for left, _ in pairs], task, masks="masks", classes=dict(enumerate(names))
        )
        (self.folder / name / "masks").mkdir()
        for number, (left, right) in enumerate(pairs):
            pixels = np.zeros((32, 32, 3), dtype=np.uint8)
            pixels[:, :16], pixels[:, 16:] = COLOURS[left], COLOURS[right]
            mask = np.zeros((32, 32), dtype=np.uint8)
            mask[:, :16], mask[:, 16:] = names.index(left), names.index(right)
            mask[0] = 255
            Image.fromarray(pixels).save(self.folder / name / "images" / f"{number:03d}.png")
            Image.fromarray(mask).save(self.folder / name / "masks" / f"{number:03d}.png")
        return path

    def manifest(self, name, source, task):
        content = {
            "name": name,
            "purpose": "evaluate",
            "title": f"Squares for {name}",
            "licence": "none",
            "get": "Draw them.",
            "source": source,
            "task": task,
        }
        path = self.folder / name / "manifest.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def open(self, manifest, run=None) -> EvaluationSet:
        about, root = find_manifest(str(manifest))
        return EvaluationSet(about, root, Encoders(run or self.run), self.folder / "features" / "eval", quiet=True)
