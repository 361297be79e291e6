"""The three commands as typed, with real encoders, on pictures saved to disk and on real photos."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

BIN = Path(sys.executable).parent
PHOTOS = Path(__file__).parents[1] / "../shared/data/flickr8k-dev"


def typed(folder: Path, line: str) -> str:
    """Run a command line in a folder and return what it printed; it must succeed."""
    program, *arguments = line.split()
    done = subprocess.run([BIN / program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_manifest(path: Path, name: str, captions: object, root: str, **fields: object) -> None:
    source = {"kind": "table", "root": root, "files": "captions.csv", "images": "images", "captions": captions}
    source["split"] = {"file": "split.csv", "column": "split", "keep": name}
    encoders = {"image": "efficientnet-lite0", "text": "minilm-l6"}
    about = {"name": name, "title": name, "licence": "test", "get": "made by a test", "encoders": encoders}
    path.write_text(yaml.safe_dump({**about, "source": source, **fields}))


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def recalls(folder: Path) -> dict[str, float]:
    (run,) = (folder / "runs").iterdir()
    (record,) = json.loads((run / "scores.json").read_bytes())["records"]
    recalls = [metric for metric in record["metrics"] if "rank" not in metric["name"]]
    return {metric["name"]: metric["value"] / metric["chance"] for metric in recalls}


def run_all(folder: Path, captions: object, root: str) -> dict[str, float]:
    """Extract, fit and evaluate in a folder; return each recall as a multiple of its chance level."""
    write_manifest(folder / "train.yaml", "train", captions, root, purpose="train")
    write_manifest(folder / "test.yaml", "test", captions, root, purpose="evaluate", task={"kind": "retrieval"})
    typed(folder, "sail-extract run train.yaml")
    assert "no problems" in typed(folder, "sail-extract verify features/train.zarr")
    typed(folder, "sail-align fit --features features/train.zarr")
    typed(folder, "sail-eval retrieval test.yaml")
    return recalls(folder)


@pytest.mark.slow
def test_scenes_saved_to_disk(tmp_path):
    from sail_align.extract.sources.demo.source import DemoSource

    (tmp_path / "images").mkdir()
    rows, split = [("image", "raw", "long")], [("image", "split")]
    for part, count in (("train", 240), ("retrieval", 60)):
        source = DemoSource(part)
        for i, sample in zip(range(count), source.samples(), strict=False):
            name = f"{part}-{i}.png"
            source.image(sample.image).save(tmp_path / "images" / name)
            rows.append((name, sample.captions["raw"], sample.captions["long"]))
            split.append((name, "train" if part == "train" else "test"))
    write_csv(tmp_path / "captions.csv", rows)
    write_csv(tmp_path / "split.csv", split)
    times_chance = run_all(tmp_path, {"raw": "raw", "long": "long"}, ".")
    assert min(times_chance.values()) > 1.5
    (run,) = (tmp_path / "runs").iterdir()
    assert "data:image" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="the development photos are not beside the project")
def test_real_photos(tmp_path):
    with (PHOTOS / "split.csv").open(encoding="utf-8") as file:
        photos = list(csv.DictReader(file))
    chosen = [p for p in photos if p["split"] == "train"][:300] + [p for p in photos if p["split"] == "test"][:100]
    write_csv(tmp_path / "split.csv", [("image", "split")] + [(p["image"], p["split"]) for p in chosen])
    (tmp_path / "captions.csv").symlink_to(PHOTOS.resolve() / "captions.csv")
    (tmp_path / "images").symlink_to(PHOTOS.resolve() / "images")
    times_chance = run_all(tmp_path, "caption", ".")
    assert min(times_chance.values()) > 2.5
