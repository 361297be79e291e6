"""sail-extract run: its options and its output."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sail_align.extract.cli.options import next_command
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import DataRoot, Devices, Quiet, Result, with_json
from sail_align.extract.system.files import as_path

if TYPE_CHECKING:
    from sail_align.extract.data import Source
    from sail_align.extract.executor.job import Job
    from sail_align.extract.manifest import Manifest
    from sail_align.extract.recognise.record import Recognised
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
ImageColumn = Annotated[
    str | None, _data_option(help="Column of the images' paths in a table of yours.  [default: found by its values]")
]
CaptionColumns = Annotated[
    str | None, _data_option(help="Columns of captions, such as title,text.  [default: found by their values]")
]
Images = Annotated[
    str | None, _data_option(help="Folder of the images that your table names.  [default: found near the table]")
]
Captions = Annotated[
    str | None, _data_option(help="Captions to encode, such as raw,long.  [default: the manifest's, else all]")
]
AddCaptions = Annotated[
    str | None, _data_option(help="Add these captions to an existing store, without reading its images.")
]

_ENCODER = (
    "Name, or hf:REPOSITORY{choices}. `sail-extract encoders` lists names.  [default: the manifest's, else {default}]"
)
ImageEncoder = Annotated[
    str | None, _encoder_option(help=_ENCODER.format(choices=", timm:MODEL, open_clip:MODEL", default="dinov2-large"))
]
TextEncoder = Annotated[
    str | None, _encoder_option(help=_ENCODER.format(choices=", open_clip:MODEL", default="gte-large"))
]
ImagePooling = Annotated[
    str | None, _encoder_option(help="cls, mean, cls+mean, pooler or pooler+mean.  [default: the encoder's own]")
]
ImageSize = Annotated[
    int | None,
    _encoder_option(
        help="Side of the images that the encoder gets, a multiple of its patches.  [default: the encoder's own]",
        min=1,
        metavar="PIXELS",
    ),
]
TextPooling = Annotated[str | None, _encoder_option(help="cls, mean, last or max.  [default: the encoder's own]")]
TextPrompt = Annotated[
    str | None,
    _encoder_option(
        help="Text before each text, such as an instruction; '' for none.  [default: the encoder's own for documents]"
    ),
]
Layers = Annotated[
    str | None,
    _encoder_option(help="Layers of both encoders to store, from the end: -1,-4,-8.  [default: -1, the output]"),
]
TextLayers = Annotated[str | None, _encoder_option(help="Layers of the text encoder, if they differ.")]
Precision = Annotated[
    str, _encoder_option(help="Precision of the encoders: float32, tf32 (NVIDIA GPUs), bfloat16, float16.")
]
AllowRemoteCode = Annotated[
    list[str] | None,
    _encoder_option(
        metavar="REPO@REVISION", help="Let this repository run its own code, at this full commit hash. May be repeated."
    ),
]
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
Download = Annotated[
    bool,
    _data_option("--download", help="First download the images, if they are not here. Needs 'sail-align[download]'."),
]
Retry = Annotated[str | None, _run_option(help="failed: retry the images that could not be encoded.", metavar="failed")]


@with_json
def run(
    data: Annotated[
        str,
        typer.Argument(
            help="Name of a packaged manifest, such as demo, or a .yaml file. Or the path of your own data: a folder "
            "of images, class folders, a table (.csv, .tsv, .jsonl, .parquet), tars, a folder of the Hugging Face "
            "library, annotations of COCO or Karpathy (.json).",
            metavar="DATA",
            show_default=False,
        ),
    ],
    out: Out = None,
    image_column: ImageColumn = None,
    caption_columns: CaptionColumns = None,
    images: Images = None,
    image_encoder: ImageEncoder = None,
    image_pooling: ImagePooling = None,
    image_size: ImageSize = None,
    text_encoder: TextEncoder = None,
    text_pooling: TextPooling = None,
    text_prompt: TextPrompt = None,
    layers: Layers = None,
    text_layers: TextLayers = None,
    captions: Captions = None,
    add_captions: AddCaptions = None,
    data_root: DataRoot = None,
    device: Devices = "auto",
    precision: Precision = "float32",
    allow_remote_code: AllowRemoteCode = None,
    compiled: Compiled = False,
    fast_jpeg: FastJpeg = False,
    workers: Workers = "auto",
    worker: OneWorker = "1/1",
    engine: Engine = "local",
    ray_address: RayAddress = None,
    retry: Retry = None,
    download: Download = False,
    quiet: Quiet = False,
) -> Result:
    """Encode a data set into a store of features. Rerun the same command to resume."""
    from sail_align.extract.build import Report, build_store

    result: dict[str, Any] = {}

    def report_run(store: "Store", job: "Job", results: Sequence[object]) -> None:
        result.update(_report_run(store, job, results, all_shards=worker == "1/1"))

    build_store(
        data,
        out=out,
        image_column=image_column,
        caption_columns=caption_columns,
        images=images,
        image_encoder=image_encoder,
        image_pooling=image_pooling,
        image_size=image_size,
        text_encoder=text_encoder,
        text_pooling=text_pooling,
        text_prompt=text_prompt,
        layers=layers,
        text_layers=text_layers,
        captions=captions,
        add_captions=add_captions,
        data_root=data_root,
        device=device,
        precision=precision,
        allow_remote_code=allow_remote_code or (),
        compile=compiled,
        fast_jpeg=fast_jpeg,
        workers=workers,
        worker=worker,
        engine=engine,
        ray_address=ray_address,
        retry=retry,
        download=download,
        quiet=quiet,
        report=Report(report_recognised, _report_source, report_opened, report_run),
    )
    return result


def report_recognised(recognised: "Recognised", file: Path, is_new: bool) -> None:
    """Print what the user's data were recognised as, and where their manifest is."""
    for line in recognised.lines:
        typer.echo(line)
    typer.echo(f"{'wrote' if is_new else 'using'} {file}")


def _report_source(about: "Manifest", source: "Source") -> None:
    """Print which files a source leaves out."""
    from sail_align.extract.data import describe_left_out

    if left_out := describe_left_out(source.left_out):
        typer.echo(f"note: {about.name}: {left_out}.")


def report_opened(about: "Manifest | None", store: "Store") -> None:
    """Print how captions from other tables were joined, and whether the number of samples is unexpected."""
    report = store.recaptions()
    for line in report.lines() if report else ():
        typer.echo(line)
    if about and store.rows != (about.expected_rows or store.rows):
        typer.echo(f"note: {about.name} has {store.rows:,} samples here; its manifest expects {about.expected_rows:,}.")


def _report_run(store: "Store", job: "Job", results: Sequence[object], *, all_shards: bool) -> dict[str, Any]:
    """Print the state of a store after a run, and the next command. Return both, ready for JSON."""
    from sail_align.extract.quality.doctor import diagnose
    from sail_align.extract.quality.pairing import Verdict

    store.require_index()
    arrays, images = store.arrays(), store.images()
    for array in arrays:
        typer.echo(f"  {array.describe()}")
    for result in results:
        typer.echo(f"{store.path}: {result}.")
    complete, diagnosis = all(array.complete for array in arrays), None
    if complete and images and any(store.texts(name) for name in store.captions):
        diagnosis = diagnose(store)
        broken = diagnosis.verdict is Verdict.BROKEN
        typer.echo(f"{'warning: ' if broken else ''}pairing check: {diagnosis.summary}")
    if failed := sum(sum(array.failed_counts.values()) for array in images.values()):
        listing = command("sail-extract", "status", "--failed", store.path)
        typer.echo(f"{failed:,} image{'s' * (failed > 1)} could not be encoded. `{listing}` lists them.")
    following = None
    if not all_shards:
        if not complete:
            typer.echo("The shards of this worker are done. The others are left to other workers.")
    elif diagnosis and diagnosis.verdict is Verdict.BROKEN:
        following = command("sail-extract", "doctor", store.path)
    elif job.manifest.purpose == "evaluate":
        train = _training_store(store)
        following = command("sail-extract", *(["overlap", train, store.path] if train else ["status", store.path]))
    else:
        if not store.captions:
            typer.echo(
                f"note: {store.dataset} has no captions, which `sail-align fit` needs. Put a text file beside each "
                "image (dog.txt for dog.jpg) or name a table under 'recaptions' in the manifest, and run with another "
                "--out."
            )
        ours = [name for name, array in images.items() if job.image and job.image.matches(array.identity.spec)]
        following = next_command(store, image=ours[0] if ours else None)
    if following:
        typer.echo(f"Next: {following}")
    pairing = diagnosis.to_dict() if diagnosis else None
    return {**store.to_dict(), "work": list(results), "pairing": pairing, "next": following}


def _training_store(evaluation: "Store") -> Path | None:
    """Return a store beside that of an evaluation set, whose images have the same encoder, None if there is none."""
    from sail_align.extract.store.store import Store

    for path in sorted(evaluation.path.parent.glob("*.zarr")):
        with suppress(UserError, OSError):
            store = Store.open(path)
            theirs, ours = (list(each.images().values()) for each in (store, evaluation))
            if len(theirs) != 1 or len(ours) != 1 or store.digest == evaluation.digest or not store.captions:
                continue
            if theirs[0].complete and theirs[0].identity.spec.fingerprint == ours[0].identity.spec.fingerprint:
                return path
    return None
