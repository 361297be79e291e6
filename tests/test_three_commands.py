"""The three commands with real encoders, on pictures saved to disk and on real photos."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from warm_processes import WarmProcess, run_command

PHOTOS = Path(__file__).parents[1] / "../shared/data/flickr8k-dev"


def write_manifest(path: Path, name: str, captions: object, **fields: object) -> None:
    source = {"kind": "table", "root": ".", "files": "captions.csv", "images": "images", "captions": captions}
    source["split"] = {"file": "split.csv", "column": "split", "keep": name}
    encoders = {"image": "efficientnet-lite0", "text": "minilm-l6", "image_size": 128}
    about = {"name": name, "title": name, "licence": "test", "get": "made by a test", "encoders": encoders}
    path.write_text(yaml.safe_dump({**about, "source": source, **fields}))


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def recalls(folder: Path) -> dict[str, float]:
    (run,) = (folder / "runs").iterdir()
    record, _corrected = json.loads((run / "scores.json").read_bytes())["records"]
    recalls = [metric for metric in record["metrics"] if "rank" not in metric["name"]]
    return {metric["name"]: metric["value"] / metric["chance"] for metric in recalls}


@pytest.fixture
def run(tmp_path: Path, start_warm: Callable[..., WarmProcess]) -> Callable[[str], str]:
    """Run a command line in a warm process and return what it printed; it must succeed."""

    def run_warm(line: str) -> str:
        process = start_warm(run_command, *line.split(), output=tmp_path / "output.txt")
        assert process.wait() == 0, process.output
        return process.output

    return run_warm


def run_all(run: Callable[[str], str], folder: Path, captions: object) -> dict[str, float]:
    """Extract, fit and evaluate in a folder; return each recall as a multiple of its chance level."""
    write_manifest(folder / "train.yaml", "train", captions, purpose="train")
    write_manifest(folder / "test.yaml", "test", captions, purpose="evaluate", task={"kind": "retrieval"})
    run("sail-extract run train.yaml")
    assert "no problems" in run("sail-extract verify features/train.zarr")
    run("sail-align fit --features features/train.zarr")
    run("sail-eval retrieval test.yaml")
    return recalls(folder)


@pytest.mark.slow
def test_scenes_saved_to_disk(tmp_path, monkeypatch, run):
    from sail_align.extract.sources.demo.source import DemoSource

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows, split = [("image", "raw", "long")], [("image", "split")]
    for part, count in (("train", 160), ("retrieval", 60)):
        source = DemoSource(part)
        for i, sample in zip(range(count), source.samples(), strict=False):
            name = f"{part}-{i}.png"
            source.image(sample.image).save(tmp_path / "images" / name)
            rows.append((name, sample.captions["raw"], sample.captions["long"]))
            split.append((name, "train" if part == "train" else "test"))
    write_csv(tmp_path / "captions.csv", rows)
    write_csv(tmp_path / "split.csv", split)
    times_chance = run_all(run, tmp_path, {"raw": "raw", "long": "long"})
    assert min(times_chance.values()) > 1.5
    (run,) = (tmp_path / "runs").iterdir()
    assert "data:image" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="the development photos are not beside the project")
def test_real_photos(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    with (PHOTOS / "split.csv").open(encoding="utf-8") as file:
        photos = list(csv.DictReader(file))
    chosen = [p for p in photos if p["split"] == "train"][:160] + [p for p in photos if p["split"] == "test"][:60]
    write_csv(tmp_path / "split.csv", [("image", "split")] + [(p["image"], p["split"]) for p in chosen])
    (tmp_path / "captions.csv").symlink_to(PHOTOS.resolve() / "captions.csv")
    (tmp_path / "images").symlink_to(PHOTOS.resolve() / "images")
    times_chance = run_all(run, tmp_path, "caption")
    assert min(times_chance.values()) > 2.5
