"""sail-extract run: its options and its output."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import DataRoot, Device, Quiet
from sail_align.extract.system.files import as_path

if TYPE_CHECKING:
    from sail_align.extract.data import Source
    from sail_align.extract.executor.job import Job
    from sail_align.extract.executor.local import LocalExecutor
    from sail_align.extract.executor.ray_cluster import RayCluster
    from sail_align.extract.manifest import Manifest
    from sail_align.extract.store.store import Store

_data_option = partial(typer.Option, rich_help_panel="Data")
_encoder_option = partial(typer.Option, rich_help_panel="Encoders")
_run_option = partial(typer.Option, rich_help_panel="Run")

Out = Annotated[
    Path | None,
    _data_option(
        help="Path or URL of the store, which is created or resumed.  [default: features/<manifest name>.zarr]",
        metavar="<path>",
        parser=as_path,
    ),
]
Captions = Annotated[
    str | None, _data_option(help="Captions to encode, such as raw,long.  [default: the manifest's, else all]")
]
AddCaptions = Annotated[
    str | None, _data_option(help="Add these captions to an existing store, without reading its images.")
]

_ENCODER = "Name, or hf:REPOSITORY{choices}. A wrong name lists all.  [default: the manifest's, else {default}]"
ImageEncoder = Annotated[
    str | None, _encoder_option(help=_ENCODER.format(choices=", timm:MODEL, open_clip:MODEL", default="dinov2-large"))
]
TextEncoder = Annotated[
    str | None, _encoder_option(help=_ENCODER.format(choices=", open_clip:MODEL", default="gte-large"))
]
ImagePooling = Annotated[str | None, _encoder_option(help="cls, mean or cls+mean.  [default: the encoder's own]")]
TextPooling = Annotated[str | None, _encoder_option(help="cls, mean or last.  [default: the encoder's own]")]
Precision = Annotated[str, _encoder_option(help="Precision of the encoders: float32, bfloat16, float16.")]
TrustRemoteCode = Annotated[bool, _encoder_option(help="Run a model's own code. Needs a pinned revision.")]
Compiled = Annotated[bool, _encoder_option("--compile", help="Compile the encoders with torch.compile.")]
FastJpeg = Annotated[
    bool, _encoder_option("--fast-jpeg", help="Decode large JPEGs at reduced scale: features within cosine 0.999.")
]

Workers = Annotated[
    str, _run_option(help="Processes on this machine; auto: one per GPU, or one on the CPU.", metavar="auto|N")
]
OneWorker = Annotated[
    str, _run_option(help="Encode only this worker's shards of the store, as in a Slurm array.", metavar="N/OF")
]
Engine = Annotated[str, _run_option(help="local: this machine; ray: a Ray cluster.", metavar="local|ray")]
RayAddress = Annotated[
    str | None, _run_option(help="The Ray cluster.  [default: $RAY_ADDRESS, else this machine alone]")
]
Retry = Annotated[str | None, _run_option(help="failed: retry the images that could not be encoded.", metavar="failed")]


def run(
    manifest: Annotated[str, typer.Argument(help="Name of a packaged manifest, such as demo, or a .yaml file.")],
    out: Out = None,
    image_encoder: ImageEncoder = None,
    image_pooling: ImagePooling = None,
    text_encoder: TextEncoder = None,
    text_pooling: TextPooling = None,
    captions: Captions = None,
    add_captions: AddCaptions = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "float32",
    trust_remote_code: TrustRemoteCode = False,
    compiled: Compiled = False,
    fast_jpeg: FastJpeg = False,
    workers: Workers = "auto",
    worker: OneWorker = "1/1",
    engine: Engine = "local",
    ray_address: RayAddress = None,
    retry: Retry = None,
    quiet: Quiet = False,
) -> None:
    """Encode a data set into a store of features. Rerun the same command to resume."""
    _check_options(retry, workers, add_captions, captions or image_encoder)
    about, root = _find_data(manifest, data_root, needed=not add_captions)

    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.executor.job import Job
    from sail_align.extract.executor.retry import retry_failed
    from sail_align.extract.executor.run import run_job
    from sail_align.extract.executor.worker import Share
    from sail_align.extract.store.store import Store

    path = out or Path("features") / f"{about.name}.zarr"
    text_name = text_encoder or about.encoders.text
    image: ImageEncoderConfig | None = None
    if add_captions:
        store = Store.open(path)
        known, chosen = store.captions, add_captions.split(",")
        if not text_encoder and (identity := store.text_identity()):
            recorded = TextEncoderConfig.recorded(identity)
            text_name, text_pooling, precision = recorded.name, recorded.pooling, recorded.precision
    else:
        image_name, options = image_encoder or about.encoders.image, (precision, trust_remote_code, compiled)
        image = ImageEncoderConfig(image_name, image_pooling, *options, fast_jpeg=fast_jpeg)
        known = _open_source(about, root).all_captions
        chosen = captions.split(",") if captions else list(about.encoders.captions or _in_store(known, path))
    names = _require_captions(about.name, chosen, known)
    text = TextEncoderConfig(text_name, text_pooling, precision, trust_remote_code, compiled) if names else None
    Runtime.of(device, precision)  # raises if either is invalid
    job = Job(about, root, path, image, text, names)
    share, executor = Share.parse(worker), _choose_executor(engine, ray_address, workers, device)
    if engine == "local" and not (path / "zarr.json").exists():
        for encoder in filter(None, (image, text)):
            encoder.download()  # before the store is created
    results: list[object] = [run_job(job, executor, share, partial(report_opened, about), quiet=quiet)]
    if retry:
        results.append(retry_failed(job, share, device, quiet=quiet))
    _report_run(Store.open(path), job, results, all_shards=worker == "1/1")


def _check_options(retry: str | None, workers: str, add_captions: str | None, conflicting: str | None) -> None:
    if retry not in (None, "failed"):
        raise UserError(f"--retry {retry!r} is invalid: expected failed.")
    if retry and workers not in ("auto", "1"):
        raise UserError("--retry works in one process. Omit --workers, or split the shards with --worker N/OF.")
    if add_captions and (conflicting or retry):
        raise UserError("--add-captions does not read images. Omit --captions, --image-encoder and --retry.")


def _find_data(manifest: str, data_root: str | None, *, needed: bool) -> tuple["Manifest", Path]:
    """Return a manifest and its data root. Raises `UserError` if the data are needed but missing."""
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    about, root = find_manifest(manifest, data_root)
    if needed and manifest in packaged_manifests():
        about.require_here(root, manifest)
    return about, root


def _open_source(about: "Manifest", root: Path) -> "Source":
    """Open the source of a manifest, and print which files it leaves out."""
    from sail_align.extract.data import describe_left_out

    source = about.open_source(root)
    if left_out := describe_left_out(source.left_out):
        typer.echo(f"note: {about.name}: {left_out}.")
    return source


def _in_store(captions: Sequence[str], path: Path) -> list[str]:
    """Return the captions that a store has if it exists: an earlier version may have found fewer in the same data."""
    from sail_align.extract.store.store import Store

    existing = Store.open(path).captions if (path / "zarr.json").exists() else captions
    return [name for name in captions if name in existing]


def _require_captions(dataset: str, chosen: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in chosen)
    for name in names:
        if name not in known:
            raise UserError(f"{dataset} has no caption {name!r}. Its captions are: {', '.join(known) or 'none'}.")
    return names


def _choose_executor(engine: str, ray_address: str | None, workers: str, device: str) -> "LocalExecutor | RayCluster":
    from sail_align.extract.executor.local import LocalExecutor

    if engine == "ray":
        from sail_align.extract.executor.ray_cluster import RayCluster

        return RayCluster(ray_address, workers, device)
    if engine != "local":
        raise UserError(f"--engine {engine!r} is invalid: expected local or ray.")
    if ray_address:
        raise UserError(f"--ray-address {ray_address} has no effect with --engine local. Add --engine ray.")
    return LocalExecutor.choose(workers, device)


def report_opened(about: "Manifest | None", store: "Store") -> None:
    """Print how captions from other tables were joined, and whether the number of samples is unexpected."""
    report = store.recaptions()
    for line in report.lines() if report else ():
        typer.echo(line)
    if about and store.rows != (about.expected_rows or store.rows):
        typer.echo(f"note: {about.name} has {store.rows:,} samples here; its manifest expects {about.expected_rows:,}.")


def _report_run(store: "Store", job: "Job", results: Sequence[object], *, all_shards: bool) -> None:
    """Print the state of a store after a run, and the next command."""
    from sail_align.extract.quality.doctor import diagnose
    from sail_align.extract.quality.pairing import Verdict

    store.require_index()
    arrays, images = store.arrays(), store.images()
    for array in arrays:
        typer.echo(f"  {array.describe()}")
    for result in results:
        typer.echo(f"{store.path}: {result}.")
    complete = all(array.complete for array in arrays)
    broken = False
    if complete and images and any(store.texts(name) for name in store.captions):
        diagnosis = diagnose(store)
        broken = diagnosis.verdict is Verdict.BROKEN
        typer.echo(f"{'warning: ' if broken else ''}pairing check: {diagnosis.summary}")
    if failed := sum(sum(array.failed_counts.values()) for array in images.values()):
        listing = command("sail-extract", "status", "--failed", store.path)
        typer.echo(f"{failed:,} image{'s' * (failed > 1)} could not be encoded. `{listing}` lists them.")
    if not all_shards:
        if not complete:
            typer.echo("The shards of this worker are done. The others are left to other workers.")
    elif broken:
        typer.echo(f"Next: {command('sail-extract', 'doctor', store.path)}")
    elif job.manifest.purpose == "evaluate":
        typer.echo(f"Next: {command('sail-extract', 'overlap', 'TRAIN.zarr', store.path)}")
    else:
        ours = [name for name, array in images.items() if job.image and job.image.matches(array.identity.spec)]
        chosen = ["--image-encoder", *ours] if ours and len(images) > 1 else []
        typer.echo(f"Next: {command('sail-align', 'fit', '--features', store.path, *chosen)}")
