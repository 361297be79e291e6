"""A small world to search: pictures on disk with captions and classes, their store, and a run with a bank."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from released_file import save_encoders
from small_world import SHADES, captions_of, draw, save_run

from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.extract.data import Status
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store.store import Store

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"> & 'a red cat'"
"""Caption of row 3."""
COPY, MISSING = 7, 5
"""Row with the picture of row 2, and the row whose file is removed after the store was made."""
ROWS = 24


@dataclass(frozen=True)
class SearchWorld:
    """Paths of a run, a store and its manifest."""

    folder: Path
    run: Path
    store: Path
    manifest: Path


def make_world(folder: Path, *, caption: str = HOSTILE, correction: str = "none", bank_rows: int = 6) -> SearchWorld:
    """Write pictures of five classes with two captions each, their store with tiny encoders, and a run on these."""
    photos = folder / "photos"
    (photos / "images").mkdir(parents=True)
    words = list(SHADES)
    with (photos / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "short", "long", "kind"])
        for row in range(ROWS):
            file = f"{row:03d}.png"
            draw(2 if row == COPY else row, SHADES[words[(2 if row == COPY else row) % 5]]).save(
                photos / "images" / file
            )
            short, long = captions_of(row)
            table.writerow([file, short, caption if row == 3 else long, words[row % 5]])
    source = {"kind": "table", "files": "captions.csv", "images": "images", "label": "kind"}
    source["captions"] = {"short": "short", "long": "long"}
    manifest = photos / "photos.yaml"
    manifest.write_text(yaml.safe_dump({"name": "photos", "source": source}))
    image, text = save_encoders(folder / "encoders")
    vision = ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load()
    language = TextEncoderConfig(f"hf:{text}", pooling="mean").load()
    store = _encode(photos / "photos.zarr", manifest, vision, language)
    (photos / "images" / f"{MISSING:03d}.png").unlink()
    run = save_run(
        folder / "runs" / "photos", vision.identity, language.identity, correction=correction, bank_rows=bank_rows
    )
    _fill_bank(run)
    return SearchWorld(folder, run, store, manifest)


def _encode(path: Path, manifest: Path, vision, language) -> Path:
    about, root = find_manifest(str(manifest))
    source = about.open_source(root)
    options = {"dataset": "photos", "manifest": about.rows, "parts": source.parts(), "captions": source.captions}
    store = Store.create(path, **options, shard_rows=16, chunk_rows=8, quiet=True)
    samples = store.samples(0, store.rows)
    pixels = [vision.preprocess(source.image(sample.image)) for sample in samples]
    arrays = {"": (store.add(vision.identity), vision(vision.normalise(torch.stack(pixels))))}
    for name in source.captions:
        texts = [sample.captions[name] for sample in samples]
        arrays[name] = (store.add(language.identity, name), language.encode(texts))
    for array, features in arrays.values():
        half = features.detach().half().numpy()
        for shard in array.shards:
            span = slice(*array.span(shard))
            array.write(shard, half[span], torch.full((len(half[span]),), Status.OK, dtype=torch.uint8).numpy())
    return path


def _fill_bank(run: Path) -> None:
    """Give the bank of a run items that matter, and write its checkpoint again."""
    loaded = load_run(run)
    bank = loaded.model.correction
    if not hasattr(bank, "fill"):
        return
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bank.fill(*(torch.randn(len(bank.image_terms), 16, generator=generator) for _ in range(2)), beta=4.0)
    saved = replace(Checkpoint.read(run))
    names = ("architecture", "image", "text", "settings")
    about = {name: saved.record[name] for name in names}
    Checkpoint.write(saved.folder, loaded.model.state_dict(), about, step=9)
