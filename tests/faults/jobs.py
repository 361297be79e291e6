"""Small jobs of the three commands, on pictures of noise and with fake encoders."""

import csv
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from fakes import PREPROCESSING, FakeText, FakeVision
from interrupted import shrink
from PIL import Image
from released_file import IMAGE_DIM, TEXT_DIM, released_tensors, save_released
from small_world import write_captioned, write_classes
from warm_processes import run_command

from sail_align.align.train import trainer
from sail_align.evaluate import dataset, evaluator, models
from sail_align.evaluate.report import page
from sail_align.extract import manifest
from sail_align.extract.encoders import load
from sail_align.extract.store import store as store_module

ROWS = 60
SHARD_ROWS = 32
LATE = ("7.png", "19.png")
"""Pictures that the command before `retry` does not find."""

STORE, OTHER, RUN = "features/pictures.zarr", "features/recaptioned.zarr", "runs/pictures"
HERE = "--device cpu --quiet"
SMALL = f"--dim 4 --batch-size 8 --held-out 0.25 {HERE}"
WITHOUT_LATE = "without-late "


@dataclass(frozen=True)
class Job:
    """A command, typed in a folder.

    Attributes:
        command: The command. INPUTS stands for the folder of the inputs, which no command changes.
        before: Commands that are run in the folder before.
        when_done: Part of the error of a rerun that finds the work done; "" if it ends with 0.
        on_fault: Part of the output of a run that may end with 1 after an error; "" if it ends with 2.
        committed: Returns, for the job's folder, beginnings of paths that a rerun must not write again.
    """

    command: str
    before: tuple[str, ...] = ()
    when_done: str = ""
    on_fault: str = ""
    committed: Callable[[Path], set[str]] = lambda folder: set()

    def run(self, inputs: Path) -> None:
        """Run the command in the current folder, in a process of its own."""
        _replace_slow_parts()
        run_command(*self.command.replace("INPUTS", str(inputs)).split())


def _markers(folder: Path) -> set[str]:
    return {str(marker.relative_to(folder)) for marker in folder.glob("features/**/commits/**/*.json")}


def _checkpoints(folder: Path) -> set[str]:
    """Return the folders of all checkpoints up to the last whole one, removed or not."""
    whole = [
        int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"{RUN}/checkpoints/step-*/model.json")
    ]
    return {f"{RUN}/checkpoints/step-{step:08d}/" for step in range(1 + max(whole, default=0))}


def _finished_runs(folder: Path) -> set[str]:
    return {f"{path.parent.relative_to(folder)}/checkpoints" for path in folder.rglob("finished.json")}


EXTRACT = f"sail-extract run INPUTS/pictures/pictures.yaml --out {STORE} {HERE}"
EXTRACT_OTHER = f"sail-extract run INPUTS/recaptioned/recaptioned.yaml --out {OTHER} {HERE}"
TRAIN = f"sail-align fit --features {STORE} --out {RUN} --head linear --lr 3e-3 --steps 4 {SMALL}"
CAPTIONED, CLASSES = "INPUTS/captioned/manifest.yaml", "INPUTS/classes/manifest.yaml"
TRAINED = (EXTRACT, TRAIN)
SCORED = (*TRAINED, f"sail-eval retrieval {CAPTIONED} --run {RUN} {HERE}")

JOBS: Mapping[str, Job] = {
    "extract": Job(EXTRACT, committed=_markers),
    "add-captions": Job(
        f"sail-extract run INPUTS/pictures/pictures.yaml --out {STORE} {HERE} --add-captions long",
        (f"{EXTRACT} --captions raw",),
        committed=_markers,
    ),
    "recaptions": Job(EXTRACT_OTHER, committed=_markers),
    "retry": Job(f"{EXTRACT} --retry failed", (WITHOUT_LATE + EXTRACT,)),
    "failed-list": Job(f"sail-extract status --failed {STORE} --out lists/failed.parquet", (WITHOUT_LATE + EXTRACT,)),
    "overlap": Job(f"sail-extract overlap {STORE} {OTHER} --out lists/overlap.txt {HERE}", (EXTRACT, EXTRACT_OTHER)),
    "fit": Job(TRAIN, (EXTRACT,), committed=_checkpoints),
    "fit-cca": Job(f"sail-align fit --features {STORE} --out {RUN} --head cca --dim 4 {HERE}", (EXTRACT,)),
    "probe": Job(
        f"sail-align probe --features {STORE} --out {RUN} --steps 2 --dim 4 --batch-size 8 {HERE}",
        (EXTRACT,),
        committed=_finished_runs,
    ),
    "measure": Job(f"sail-align measure {STORE} --rows 100 --neighbours 3 --out lists/measures.json", (EXTRACT,)),
    "import": Job(
        f"sail-align import-released INPUTS/released.pt --encoders big-image,big-text --out {RUN} --device cpu"
    ),
    "evaluate": Job(
        f"sail-eval all --manifest {CAPTIONED} --manifest {CLASSES} --run {RUN} {HERE}",
        TRAINED,
        on_fault="ERROR: ",
        committed=_markers,
    ),
    "score-another": Job(f"sail-eval classification {CLASSES} --run {RUN} {HERE}", SCORED, committed=_markers),
    "score-checkpoint": Job(f"sail-eval retrieval {CAPTIONED} --run {RUN}/checkpoints/step-00000004 {HERE}", SCORED),
    "report": Job(f"sail-eval report {RUN}", SCORED),
    "report-html": Job(f"sail-eval report {RUN} --out tables/all.html", SCORED),
    "report-csv": Job(f"sail-eval report {RUN} --out tables/all.csv", SCORED),
    "export": Job(f"sail-align export {RUN} --out exports/pictures", SCORED, when_done="exists already"),
}


class Inputs:
    """The pictures, tables and manifests that jobs read, and for each job the folder in which it begins.

    Args:
        folder: An empty folder.
        fork: Calls a function in a process of its own and in a folder. Raises if it fails.
    """

    def __init__(self, folder: Path, fork: Callable[[Callable[[], None], Path], None]):
        self.folder, self._bases, self._fork = folder / "inputs", folder / "bases", fork
        self._made: dict[tuple[str, ...], Path] = {}
        _write_pictures(self.folder / "pictures", {"raw": "caption", "long": "story"})
        more = {"files": "captions.csv", "key": "image", "captions": {"long": "story"}}
        _write_pictures(self.folder / "recaptioned", {"raw": "caption"}, recaptions=more)
        write_captioned(self.folder / "captioned", rows=8)
        write_classes(self.folder / "classes")
        save_released(self.folder / "released.pt", released_tensors(expansion=2))

    def base(self, job: Job) -> Path:
        """Return the folder in which a job begins."""
        return self._after(job.before)

    def _after(self, commands: tuple[str, ...]) -> Path:
        if commands not in self._made:
            folder = self._bases / str(len(self._made))
            self._made[commands] = folder
            if not commands:
                folder.mkdir(parents=True)
                return folder
            before = self._after(commands[:-1])
            shutil.copytree(before, folder)
            command = commands[-1].removeprefix(WITHOUT_LATE)
            with self._hide(LATE if command != commands[-1] else ()):
                self._fork(lambda: Job(command).run(self.folder), folder)
        return self._made[commands]

    @contextmanager
    def _hide(self, names: tuple[str, ...]) -> Iterator[None]:
        images = [self.folder / "pictures" / "images" / name for name in names]
        for image in images:
            image.rename(image.with_suffix(".hidden"))
        yield
        for image in images:
            image.with_suffix(".hidden").rename(image)


def _write_pictures(folder: Path, captions: Mapping[str, str], **more: object) -> None:
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", "story"))
        for row in range(ROWS):
            table.writerow((f"{row}.png", f"picture {row} of noise", f"A long story of picture {row}"))
            Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "images" / f"{row}.png")
    source = {"kind": "table", "files": "captions.csv", "images": "images", "captions": dict(captions)}
    about = {"name": folder.name, "purpose": "train", "title": "Noise", "licence": "none", "get": "-", "source": source}
    (folder / f"{folder.name}.yaml").write_text(yaml.safe_dump({**about, **more}))


class _FakeEncoder:
    """Stands for `ImageEncoderConfig` or `TextEncoderConfig`."""

    def __init__(self, name: str, *_: object, **__: object):
        self.name = name

    @classmethod
    def recorded(cls, identity) -> "_FakeEncoder":
        return cls(identity.spec.id)

    def download(self) -> None:
        """Return: there is nothing to download."""

    def matches(self, spec) -> bool:
        return spec == self.load("cpu").identity.spec


class _FakeImageEncoder(_FakeEncoder):
    pooling, precision, layers, image_size = None, "float32", (-1,), None

    def load(self, device: str):
        return FakeVision(preprocessing=PREPROCESSING, **({"dim": IMAGE_DIM} if self.name == "big-image" else {}))


class _FakeTextEncoder(_FakeEncoder):
    pooling, precision, layers, prompt = None, "float32", (-1,), None

    def load(self, device: str):
        return FakeText(**({"dim": TEXT_DIM} if self.name == "big-text" else {}))


def _replace_slow_parts() -> None:
    """Use fake encoders, small shards and index files, saves after each step, no charts, and a clock that stands."""
    load.ImageEncoderConfig, load.TextEncoderConfig = _FakeImageEncoder, _FakeTextEncoder
    models.load_recorded = lambda recorded, *_, **__: (
        FakeVision(preprocessing=PREPROCESSING) if recorded.spec.modality == "image" else FakeText()
    )
    store_module._shard_rows = lambda rows: SHARD_ROWS
    shrink()
    trainer.fit.__kwdefaults__["save_seconds"] = 0
    evaluator.time = dataset.time = SimpleNamespace(monotonic=lambda: 0.0)
    manifest.packaged_manifests = dict
    page.line_chart = page.radar_chart = lambda *_, **__: ""
