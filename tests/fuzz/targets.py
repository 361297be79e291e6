"""The kinds of files that are fuzzed: valid worlds, and the code that reads each.

A target makes one or more cases. A case is a folder of valid files, which of them are mutated, and `act`, which reads
the folder as the commands do and returns what it read. `act` runs with the folder as its current folder.
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from fakes import FakeText, FakeVision, identity
from fuzz.child import Notes
from fuzz.mutations import mutate, rename
from PIL import Image
from released_file import IMAGE_DIM, TEXT_DIM, released_tensors, save_encoders, save_released
from small_world import draw, save_run, write_captioned, write_classes
from tars import img2dataset_members, write_tar

from sail_align.align import pretrained
from sail_align.align.hub.folder import write_hub_folder
from sail_align.align.hub.model_card import model_card, read_scores
from sail_align.align.hub.released import Released
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import RunFolder, content_digest, record_digest
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit
from sail_align.evaluate.compare import Comparison
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import FORMATS, html
from sail_align.evaluate.results.scores import RunScores
from sail_align.extract.cli import main as extract_main
from sail_align.extract.data import Part, Sample, Status, UnreadableImageError
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.sources.images import FolderSource, read_image
from sail_align.extract.store.open_or_create import open_or_create
from sail_align.extract.store.recaptions import RecaptionReport
from sail_align.extract.store.store import Store

READ_IMAGES = 6
"""Images of a data set that are decoded."""
Files = dict[str, bytes | None]
"""New content of files by their paths, None for a file that is removed."""


def _nothing(files: Files, random: Random) -> bool:
    return False


@dataclass(frozen=True)
class Case:
    """A valid folder, and how it is read.

    Attributes:
        name: Name within the target.
        folder: The folder.
        act: Reads the folder and returns what it read. Notes take what is declared without an error.
        files: Patterns of the files that are mutated.
        covered: Whether digests cover these files: a change must not alter what is read without an error.
        reseal: Corrects the digests in the files of a mutated folder, so that the mutation reaches the code after the
            check of digests. Returns whether it has done so.
        rename: Whether files get other names, instead of other content.
    """

    name: str
    folder: Path
    act: Callable[[Notes], object]
    files: tuple[str, ...]
    covered: bool = False
    reseal: Callable[[Files, Random], bool] = _nothing
    rename: bool = False

    def mutated(self, random: Random) -> tuple[Files, bool]:
        """Return the content of changed files by their paths, and whether their digests are those of the content."""
        paths = sorted({path for pattern in self.files for path in self.folder.glob(pattern) if path.is_file()})
        path = random.choice(paths)
        name = path.relative_to(self.folder).as_posix()
        if self.rename:
            folder, _, last = name.rpartition("/")
            return {name: None, f"{folder}/{rename(last, random)}": path.read_bytes()}, False
        files: Files = {name: mutate(name, path.read_bytes(), random)}
        return files, self.reseal(files, random)


def check(manifest: str) -> str:
    """Run `sail-extract check` in this process. Returns what it printed. Raises `UserError` if its exit code is 2."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["sail-extract", "check", manifest]
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            extract_main()
    except SystemExit as end:
        code = end.code or 0
    if code == 2:
        raise UserError(err.getvalue())
    if code not in (0, 1):
        raise RuntimeError(f"exit code {code}: {err.getvalue()[-500:]}")
    return out.getvalue()


# ---- data sets


def ingest(notes: Notes, manifest: str = "manifest.yaml") -> object:
    """Index a data set as `run` does, decode some images, and require that `check` does not promise more."""
    try:
        seen = _ingest(notes, manifest)
    except UserError as problem:
        with suppress(UserError):
            checked = check(manifest)
            if checked.rstrip().endswith("\nready"):
                raise RuntimeError(f"`check` says ready, but `run` fails: {problem}") from problem
        raise
    checked = check(manifest)
    if not checked.rstrip().endswith("\nready"):
        notes.add(checked)
    return seen


def _ingest(notes: Notes, manifest: str) -> object:
    about, root = find_manifest(manifest)
    about.require_here(root, manifest)
    source = about.open_source(root)
    store = open_or_create(Path("s.zarr"), about, source, quiet=True)
    samples = store.samples(0, store.rows)
    for sample in samples[:READ_IMAGES]:
        try:
            source.image(sample.image)
            if sample.mask:
                source.mask(sample.mask)
        except UnreadableImageError as problem:
            notes.add(problem.status.label)
    return [(each.key, sorted(each.captions.items()), each.label) for each in samples]


def write_yaml(folder: Path, source: dict[str, Any], **fields: Any) -> None:
    content = {"name": "fuzzed", "purpose": "train", "title": "Fuzzed", "licence": "none", "get": "Draw it."}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.yaml").write_text(yaml.safe_dump({**content, "source": source, **fields}))


def write_images(folder: Path, count: int = 6) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw(number, (40 * number, 99, 200)).resize((20, 15)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def tar_cases(folder: Path) -> Iterable[Case]:
    for name, captions in (("named", {"raw": "txt", "json": "json:caption"}), ("several", "json:several")):
        root = folder / name
        write_yaml(root, {"kind": "webdataset", "files": "*.tar", "captions": captions})
        members = img2dataset_members(range(5))
        if name == "several":
            members = [
                (
                    file,
                    json.dumps({**json.loads(data), "several": ["a", "b"]}).encode() if file.endswith("json") else data,
                )
                for file, data in members
            ]
        write_tar(root / "0.tar", members)
        write_tar(root / "1.tar", [("x" * 120 + "/ü.jpg", members[0][1]), ("x" * 120 + "/ü.txt", b"long name")], 2)
        yield Case(name, root, ingest, ("*.tar",))
    root = folder / "labels"
    write_yaml(root, {"kind": "webdataset", "captions": {}, "classes": ["a", "b", "c"]})
    members = [
        (f"{n}.{e}", d)
        for n in range(4)
        for e, d in (("cls", b"%d" % (n % 3)), ("jpg", img2dataset_members([n])[0][1]))
    ]
    write_tar(root / "0.tar", members)
    pq.write_table(
        pa.table({"key": ["0", "1", "2", "3"], "url": [f"http://x/{n}" for n in range(4)]}), root / "0.parquet"
    )
    yield Case("labels", root, ingest, ("*.tar", "*.parquet"))


def _data_sets(folder: Path) -> dict[str, Path]:
    """Write a small data set of each kind, with its manifest."""
    write_captioned(folder / "table", 4)
    write_classes(folder / "class-folder")
    masks = folder / "mask-folder"
    names = write_images(masks / "images")
    (masks / "masks").mkdir()
    for name in names:
        Image.fromarray(np.arange(300, dtype=np.uint8).reshape(15, 20) % 3).save(masks / "masks" / name)
    source = {"kind": "mask-folder", "images": "images", "masks": "masks", "classes": {1: "a", 2: "b"}, "ignored": [0]}
    write_yaml(masks, source, purpose="evaluate", task={"kind": "segmentation"})
    recaptioned = folder / "recaptions"
    write_images(recaptioned / "images")
    rows = [["image", "caption", "url"]] + [[f"{n}.png", f"picture {n}", f"http://x/{n}"] for n in range(6)]
    with (recaptioned / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with (recaptioned / "r.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [["url", "long"], *([f"http://x/{n}", f"long {n}"] for n in range(6))]
        )
    source = {"kind": "table", "files": "t.csv", "images": "images", "captions": {"raw": "caption"}, "url": "url"}
    write_yaml(recaptioned, source, recaptions={"files": "r.tsv", "url": "url", "captions": {"long": "long"}})
    tar = folder / "webdataset"
    write_yaml(tar, {"kind": "webdataset", "files": "{0..1}.tar", "captions": {"raw": "txt"}})
    for number in range(2):
        write_tar(tar / f"{number}.tar", img2dataset_members(range(3)))
    return {path.name: path for path in sorted(folder.iterdir())}


def manifest_cases(folder: Path) -> Iterable[Case]:
    for name, root in {**_data_sets(folder), **_annotated(folder)}.items():
        yield Case(name, root, ingest, ("manifest.yaml",))


def table_cases(folder: Path) -> Iterable[Case]:
    columns = {
        "image": [f"{n}.png" for n in range(6)],
        "caption": ["plain", 'with "marks"', "with, comma", "two\nlines", "ü", ""],
        "story": [f"story {n}" for n in range(6)],
        "url": [f"http://example.org/{n}" for n in range(6)],
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        root = folder / ending
        write_images(root / "images")
        captions = {"raw": "caption", "long": "story"}
        source = {"kind": "table", "files": f"t.{ending}", "images": "images", "captions": captions, "url": "url"}
        write_yaml(root, source)
        if ending == "parquet":
            pq.write_table(pa.table(columns), root / "t.parquet")
        elif ending == "jsonl":
            (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            with (root / f"t.{ending}").open("w", newline="") as file:
                table = csv.writer(file, delimiter="," if ending == "csv" else "\t")
                table.writerows([list(columns), *(row.values() for row in rows)])
        yield Case(ending, root, ingest, (f"t.{ending}",))
    root = folder / "split"
    write_images(root / "images")
    split = {"file": "split.csv", "column": "part", "keep": "test"}
    source = {"kind": "table", "files": "t.csv", "images": "images", "captions": "caption", "split": split}
    write_yaml(root, source, purpose="evaluate", task={"kind": "retrieval"})
    (root / "t.csv").write_text("image,caption\n" + "".join(f"{n}.png,picture {n}\n" * 2 for n in range(6)))
    (root / "split.csv").write_text("image,part\n" + "".join(f"{n}.png,{['test', 'train'][n % 2]}\n" for n in range(6)))
    yield Case("split", root, ingest, ("t.csv", "split.csv"))
    root = _data_sets(folder / "more")["recaptions"]
    yield Case("recaptions", root, ingest, ("r.tsv",))


def _annotated(folder: Path) -> dict[str, Path]:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(6)]
    captions = [{"image_id": n, "id": 10 * n + k, "caption": f"picture {n}, {k}"} for n in range(6) for k in range(2)]
    sentences = [{"raw": "a picture", "tokens": ["a"]}, {"raw": "another"}]
    karpathy = [{"filename": f"{n}.png", "split": "test", "sentences": sentences, "imgid": n} for n in range(6)]
    tag = {"collapsed_tag": "Object"}
    winoground = [
        {"id": n, "image_0": f"{2 * n}", "image_1": f"{2 * n + 1}", "caption_0": "a b", "caption_1": "b a", **tag}
        for n in range(3)
    ]
    questions = "Question ID,Type,Statement\n" + "".join(f"{n},camera,picture {n}\n" for n in range(6))
    contents = {
        "coco-captions": ("annotations", "a.json", json.dumps({"images": images, "annotations": captions})),
        "karpathy": ("annotations", "a.json", json.dumps({"images": karpathy, "dataset": "coco"})),
        "winoground": ("examples", "a.jsonl", "".join(json.dumps(each) + "\n" for each in winoground)),
        "mmvp": ("questions", "a.csv", questions),
    }
    for kind, (field, name, content) in contents.items():
        root = folder / kind
        at = root / "images" / ("camera" if kind == "mmvp" else "")
        for file in write_images(at):
            if kind == "mmvp":
                (at / file).rename(at / file.replace("png", "jpg"))
        (root / name).write_text(content)
        task = {"kind": kind if kind in ("winoground", "mmvp") else "retrieval"}
        write_yaml(root, {"kind": kind, field: name, "images": "images"}, purpose="evaluate", task=task)
    return {kind: folder / kind for kind in contents}


def annotated_cases(folder: Path) -> Iterable[Case]:
    for kind, root in _annotated(folder).items():
        yield Case(kind, root, ingest, ("a.*",))


def name_cases(folder: Path) -> Iterable[Case]:
    patterns = {"class-folder": "val/*/*", "mask-folder": "*/*.png", "table": "images/*", "webdataset": "*.tar"}
    for name, root in _data_sets(folder).items():
        if name in patterns:
            yield Case(name, root, ingest, (patterns[name],), rename=True)


def picture_cases(folder: Path) -> Iterable[Case]:
    folder.mkdir(parents=True, exist_ok=True)
    rgb = draw(0, (90, 120, 60)).resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    sixteen = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
    variants: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "baseline.jpg": (rgb, {"exif": exif}),
        "progressive.jpg": (rgb, {"progressive": True, "icc_profile": b"x" * 200}),
        "grey.jpg": (rgb.convert("L"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "rgb.png": (rgb, {"exif": exif}),
        "rgba.png": (rgb.convert("RGBA"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "sixteen.png": (sixteen, {}),
        "bits.png": (rgb.convert("1"), {}),
        "lossy.webp": (rgb, {}),
        "lossless.webp": (rgb.convert("RGBA"), {"lossless": True}),
        "moving.gif": (palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        "rgb.bmp": (rgb, {}),
        "raw.tiff": (rgb, {"exif": exif}),
        "lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tiff": (sixteen, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (rgb, {"compression": "jpeg"}),
        "group4.tiff": (rgb.convert("1"), {"compression": "group4"}),
        "float.tiff": (Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)), {}),
        "rgb.jp2": (rgb, {}),
        "rgb.avif": (rgb, {}),
        "rgb.ppm": (rgb, {}),
    }
    for name, (image, options) in variants.items():
        with suppress(KeyError, OSError):  # this Pillow cannot write the format
            (folder / name).parent.mkdir(exist_ok=True)
            image.save(folder / name, **options)
    yield Case(
        "pictures", folder, _decode, tuple(path.name for path in sorted(folder.iterdir()) if path.stat().st_size)
    )
    masks = folder.with_name(f"{folder.name}-masks")
    masks.mkdir()
    values = np.arange(300, dtype=np.uint8).reshape(15, 20) % 4
    Image.fromarray(values).save(masks / "grey.png")
    palette = Image.fromarray(values, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(masks / "palette.png", bits=2)
    yield Case("masks", masks, _decode_masks, ("*.png",))


def _decode(notes: Notes) -> object:
    seen = []
    for path in sorted(Path().iterdir()):
        for least in (0, 8):
            try:
                seen.append(read_image(path, least=least).tobytes())
            except UnreadableImageError as problem:
                notes.add(problem.status.label)
    return seen


def _decode_masks(notes: Notes) -> object:
    seen = []
    for path in sorted(Path().iterdir()):
        try:
            seen.append(FolderSource.read_mask(path).tobytes())
        except UnreadableImageError as problem:
            notes.add(problem.status.label)
    return seen


# ---- stores


def make_store(path: Path, rows: int = 40) -> Store:
    samples = [Sample(f"key {n}", f"{n}.jpg", {"raw": f"picture {n}"}, url=f"http://x/{n}") for n in range(rows)]
    parts = [Part.of(samples)]
    store = Store.create(
        path, dataset="photos", manifest={}, parts=parts, captions=["raw"], shard_rows=16, chunk_rows=4
    )
    random = np.random.default_rng(0)
    factors = random.normal(size=(rows, 4))
    for array in (store.add(identity("image", dim=6)), store.add(identity("text", dim=5), "raw")):
        noise = random.normal(size=(rows, array.dim))
        features = (factors @ random.normal(size=(4, array.dim)) + noise).astype(np.float16)
        status = np.zeros(rows, dtype=np.uint8)
        features[3], status[3] = np.nan, Status.MISSING
        for shard in array.shards:
            span = slice(*array.span(shard))
            array.write(shard, features[span], status[span])
    return store


def index_cases(folder: Path) -> Iterable[Case]:
    make_store(folder / "s.zarr")
    files = ("s.zarr/index/*", "s.zarr/**/zarr.json", "s.zarr/commits/**/*.json")
    yield Case("store", folder, _read_store, files, covered=True)
    joined = _data_sets(folder.with_name(f"{folder.name}-joined"))["recaptions"]
    about, root = find_manifest(str(joined / "manifest.yaml"))
    open_or_create(joined / "s.zarr", about, about.open_source(root), quiet=True)
    yield Case("joined", joined, _open_again, ("s.zarr/index/*", "s.zarr/zarr.json"))


def shard_cases(folder: Path) -> Iterable[Case]:
    make_store(folder / "s.zarr")
    yield Case("shards", folder, _read_store, ("s.zarr/**/c/**/*",), covered=True)


def _read_store(notes: Notes) -> object:
    for text, damage in verify_store(Path("s.zarr")):
        if damage:
            notes.add(text)
    store = Store.open("s.zarr")
    seen: list[object] = [store.rows, store.dataset, store.index().to_pydict(), store.samples(0, store.rows)]
    for array in store.arrays():
        features, status = array.read()
        seen += [array.path, array.counts, status.tobytes(), features.tobytes()]
        with suppress(AttributeError):
            seen.append(array.read(5, 20)[0].tobytes())
    return seen


def _open_again(notes: Notes) -> object:
    about, root = find_manifest("manifest.yaml")
    store = open_or_create(Path("s.zarr"), about, about.open_source(root), quiet=True)
    report = RecaptionReport.read(store.path / "index")
    return [store.samples(0, store.rows), report.lines() if report else None]


def lease_cases(folder: Path) -> Iterable[Case]:
    make_store(folder / "s.zarr")
    array = Store.open(folder / "s.zarr").image()
    for marker in (folder / "s.zarr/commits" / array.path).glob("0.json"):
        marker.unlink()
    leases = folder / "s.zarr/leases" / array.path
    leases.mkdir(parents=True)
    owner = {"machine": "elsewhere", "pid": 3, "start": "5", "token": "0" * 32}
    (leases / "0.0.json").write_text(json.dumps(owner) + "\n")
    (leases / "1.7.json").write_text(json.dumps(owner) + "\n..")
    yield Case("leases", folder, _use_leases, ("s.zarr/leases/**/*",))


def _use_leases(notes: Notes) -> object:
    store = Store.open("s.zarr")
    array = store.image()
    taken = [store.leases.take(f"{array.path}/{shard}") is not None for shard in (0, 1, 2)]
    store.leases.close()
    store.tidy()
    return taken


# ---- runs, heads, exports


def _state(run: Any) -> list[object]:
    weights = [(name, tensor.numpy().tobytes()) for name, tensor in sorted(run.model.state_dict().items())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        image = run.model.encode_image(torch.randn(2, run.image.spec.dim, generator=generator))
        text = run.model.encode_text(torch.randn(2, run.text.spec.dim, generator=generator))
    settings = {name: value for name, value in run.settings.items() if name != "stores"}
    return [weights, image.tolist(), text.tolist(), run.image, run.text, settings, run.digest, run.step, run.finished]


def export_cases(folder: Path) -> Iterable[Case]:
    folder.mkdir(parents=True)
    image, text = save_encoders(folder / "encoders")
    encoders = (
        ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load().identity,
        TextEncoderConfig(f"hf:{text}", pooling="mean").load().identity,
    )
    run = save_run(folder / "run", *encoders)
    root = folder / "world"
    root.mkdir()
    write_hub_folder(load_run(run), root / "hub", "# card")
    act = partial(_load_export, image=image.resolve(), text=text.resolve())
    files = ("hub/*.json", "hub/*.safetensors")
    yield Case("as it is", root, act, files, covered=True)
    yield Case("resealed", root, act, files, reseal=partial(_reseal_export, root / "hub"))


def _load_export(notes: Notes, image: Path, text: Path) -> object:
    seen = [str(RunFolder(Path("hub")).scores), *_state(pretrained.read("hub"))]
    model = pretrained.load("hub", device="cpu", image_folder=image, text_folder=text)
    return [*seen, model.encode_text(["a red cat"]).tolist(), float(model.logit_scale), float(model.logit_bias)]


def _reseal_export(hub: Path, files: Files, random: Random) -> bool:
    try:
        record = json.loads(files.get("hub/config.json", (hub / "config.json").read_bytes()))
        if weights := files.get("hub/model.safetensors"):
            record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        record["digest"] = record_digest(record)
        files["hub/config.json"] = json.dumps(record).encode()
    except (ValueError, TypeError, RecursionError, AttributeError, KeyError):
        return False
    return True


def head_cases(folder: Path) -> Iterable[Case]:
    folder.mkdir(parents=True)
    (folder / "zip").mkdir()
    save_released(folder / "zip/heads.pt", released_tensors(2))
    yield Case("zip", folder / "zip", _import_released, ("heads.pt",))
    (folder / "old").mkdir()
    saved = torch.load(folder / "zip/heads.pt", weights_only=True)
    torch.save(saved, folder / "old/heads.pt", _use_new_zipfile_serialization=False)
    yield Case("old form", folder / "old", _import_released, ("heads.pt",))


def _import_released(notes: Notes) -> object:
    released = Released.read(Path("heads.pt"))
    encoders = identity("image", dim=IMAGE_DIM), identity("text", dim=TEXT_DIM)
    record = released.record(*encoders)
    assert released.needs_clamp in (True, False)
    run = claim_run(Path("runs/heads"), record["settings"], numbered=False).path
    Checkpoint.write(RunFolder(run).checkpoint(0), released.model.state_dict(), record, step=0)
    return _state(load_run(run))


FIT = {"steps": 4, "dim": 4, "preset": "small", "head": "linear"}


class _StopError(BaseException):
    """Stops a fit between two steps."""


def run_cases(folder: Path) -> Iterable[Case]:
    for name, steps in (("finished", None), ("unfinished", 2)):
        root = folder / name
        make_store(root / "s.zarr")
        _fit_until(root, steps)
        files = ("run/*.json*", "run/checkpoints/*/*")
        yield Case(name, root, _rerun, files, covered=True)
        yield Case(f"{name}, resealed", root, _rerun, files, reseal=partial(_reseal_checkpoint, root))


def _fit_until(root: Path, stop: int | None) -> None:
    before, write = os.getcwd(), Checkpoint.write

    def write_and_stop(*arguments: Any, step: int, **options: Any) -> None:
        write(*arguments, step=step, **options)
        if step == stop:
            raise _StopError

    os.chdir(root)
    Checkpoint.write = staticmethod(write_and_stop)  # type: ignore[method-assign,assignment]
    try:
        with suppress(_StopError):
            _fit()
    finally:
        Checkpoint.write = staticmethod(write)  # type: ignore[method-assign]
        os.chdir(before)


def _fit() -> Path:
    plan, _ = make_plan([Path("s.zarr")], FIT)
    run = claim_run(Path("run"), plan.record(), numbered=False).path
    fit(plan, run, device=torch.device("cpu"), quiet=True, save_seconds=0)
    return run


def _rerun(notes: Notes) -> object:
    loaded = load_run("run")
    Checkpoint.best(Path("run"))
    _fit()
    return [loaded.step, *_state(load_run("run")), Path("run/metrics.jsonl").read_bytes()]


def _reseal_checkpoint(root: Path, files: Files, random: Random) -> bool:
    (name,) = files
    folder = name.rpartition("/")[0]
    if "/checkpoints/" not in name:
        return False
    try:
        record = json.loads(files.get(f"{folder}/model.json", (root / folder / "model.json").read_bytes()))
        for part in ("model", "optimizer"):
            if content := files.get(f"{folder}/{part}.safetensors"):
                record[{"model": "weights_sha256"}.get(part, f"{part}_sha256")] = hashlib.sha256(content).hexdigest()
        record["digest"] = record_digest(record)
        files[f"{folder}/model.json"] = json.dumps(record).encode()
    except (ValueError, TypeError, RecursionError, AttributeError, KeyError):
        return False
    return True


def score_cases(folder: Path) -> Iterable[Case]:
    from sail_align.evaluate import models

    folder.mkdir(parents=True)
    sets = [write_captioned(folder / "pairs"), write_classes(folder / "classes")]
    images, texts = FakeVision(), FakeText()
    load, models.load_recorded = (
        models.load_recorded,
        lambda each, *_, **__: images if each.spec.modality == "image" else texts,
    )
    before = Path.cwd()
    root = folder / "world"
    root.mkdir()
    os.chdir(root)
    try:
        for number in range(2):
            run = save_run(Path(f"runs/{number}"), images.identity, texts.identity, seed=number)
            (run / "metrics.jsonl").write_text("")
            for record in evaluate_sets(
                load_run(run), [find_manifest(str(path)) for path in sets], features=folder / "f", quiet=True
            ):
                assert not record.error, record.error
    finally:
        models.load_recorded = load
        os.chdir(before)
    files = ("runs/0/scores.json", "runs/0/outcomes/*")
    yield Case("as it is", root, _report, files, covered=True)
    yield Case("resealed", root, _report, (*files, "runs/0/examples/*", "runs/0/settings.json"), reseal=_reseal_scores)


def _report(notes: Notes) -> object:
    first, second = (RunScores.read(Path("runs") / name, name) for name in ("0", "1"))
    overview = Overview([first, second])
    seen: list[object] = [FORMATS[ending](overview) for ending in (".md", ".tex", ".csv")]
    run = load_run("runs/0")
    card = model_card(run, read_scores(run)[0], "mit")
    return [*seen, html(Overview([first])), Comparison.between(first, second).table(), card]


def _reseal_scores(files: Files, random: Random) -> bool:
    try:
        content = json.loads(files["runs/0/scores.json"])
        content.pop("digest")
        files["runs/0/scores.json"] = json.dumps({**content, "digest": content_digest(content)}).encode()
    except (ValueError, TypeError, RecursionError, AttributeError, KeyError):
        return False
    return True


TARGETS: dict[str, Callable[[Path], Iterable[Case]]] = {
    "tar": tar_cases,
    "manifest": manifest_cases,
    "table": table_cases,
    "annotated": annotated_cases,
    "name": name_cases,
    "picture": picture_cases,
    "index": index_cases,
    "shard": shard_cases,
    "lease": lease_cases,
    "scores": score_cases,
    "export": export_cases,
    "heads": head_cases,
    "run": run_cases,
}
