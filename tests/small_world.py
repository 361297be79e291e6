"""Pictures with captions and classes on disk, and a run of random heads on small encoders, for whole paths."""

import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import FitSettings

SHADES = {
    "red": (220, 30, 30),
    "green": (30, 200, 60),
    "cat": (40, 60, 220),
    "dog": (240, 230, 40),
    "bench": (20, 20, 20),
}


def draw(seed: int, colour: tuple[int, int, int]) -> Image.Image:
    """Return noise of a colour, 60 × 80: no two alike."""
    noise = np.random.default_rng(seed).integers(-60, 60, (60, 80, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def captions_of(row: int) -> tuple[str, str]:
    """Return two captions that no other row has: in a tie, programs differ."""
    words, places = list(SHADES), ("on", "under", "with", "and")
    first, second = words[row % 5], words[row // 5 % 5]
    return f"a {first} {places[row // 25]} the {second}", f"the {first} sleeps {places[row // 25]} a {second} and a dog"


def write_captioned(folder: Path, rows: int = 12) -> Path:
    """Write pictures with two captions each, and their manifest for retrieval; return the manifest's path."""
    (folder / "images").mkdir(parents=True)
    words = list(SHADES)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "short", "long"])
        for row in range(rows):
            draw(row, SHADES[words[row % len(words)]]).save(folder / "images" / f"{row:03d}.png")
            table.writerow([f"{row:03d}.png", *captions_of(row)])
    source = {"kind": "table", "files": "captions.csv", "images": "images", "captions": {"c0": "short", "c1": "long"}}
    return _manifest(folder, source, {"kind": "retrieval"})


def write_classes(folder: Path, templates: tuple[str, ...] = ("a {}", "the {} on the bench")) -> Path:
    """Write three to seven pictures a class, and their manifest for classification; return the manifest's path."""
    for label, (word, colour) in enumerate(SHADES.items()):
        (folder / "val" / word).mkdir(parents=True)
        for number in range(3 + label):
            draw(100 * label + number, colour).save(folder / "val" / word / f"{number}.png")
    source = {"kind": "class-folder", "root": "val"}
    return _manifest(folder, source, {"kind": "classification", "templates": list(templates)})


def _manifest(folder: Path, source: dict, task: dict) -> Path:
    content = {
        "name": folder.name,
        "purpose": "evaluate",
        "title": f"Noise of {folder.name}",
        "licence": "none",
        "get": "Draw it.",
        "source": source,
        "task": task,
    }
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def save_run(folder: Path, image, text, *, seed: int = 0, **shape) -> Path:
    """Save a finished run of random heads, of biases and norms that matter, on these encoders; return its folder."""
    architecture = Architecture(
        **{"head": "glu", "dim": 16, "expansion": 2, **shape}, image_dim=image.spec.dim, text_dim=text.spec.dim
    )
    torch.manual_seed(seed)
    model = architecture.build()
    with torch.no_grad():
        for head in (model.image_head, model.text_head):
            for parameter in head.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    chosen = FitSettings(head=architecture.head, dim=architecture.dim, expansion=architecture.expansion, steps=9)
    data = {"captions": ["raw"], "stores": ["/somewhere/photos.zarr"], "store_digests": ["c" * 64]}
    settings = {**asdict(chosen), **data, "training_rows": 1234, "held_out_rows": 56}
    run = claim_run(folder, settings).path
    about = {"architecture": asdict(architecture), "image": image.to_json(), "text": text.to_json()}
    Checkpoint.write(RunFolder(run).checkpoint(9), model.state_dict(), {**about, "settings": settings}, step=9)
    return run
