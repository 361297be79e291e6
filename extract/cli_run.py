"""The command `sail-extract run`: what was typed becomes a job, and its end is told."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.extract.errors import UserError
from sail_align.extract.files import as_path

if TYPE_CHECKING:
    from sail_align.extract.store import Store

DataRoot = Annotated[
    str | None,
    typer.Option(help="Where the manifest's files are.  [default: $SAIL_DATA_ROOT, else data/ or the .yaml's folder]"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def run(
    manifest: Annotated[str, typer.Argument(help="A packaged manifest's name, such as demo, or a .yaml file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The store to make or go on with, a path or a URL.  [default: features/<manifest name>.zarr]",
            metavar="<path>",
            parser=as_path,
        ),
    ] = None,
    image_encoder: Annotated[str | None, typer.Option(help="[default: the manifest's, else dinov2-large]")] = None,
    image_pooling: Annotated[str | None, typer.Option(help="[default: the encoder's own]")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="[default: the manifest's, else gte-large]")] = None,
    text_pooling: Annotated[str | None, typer.Option(help="[default: the encoder's own]")] = None,
    captions: Annotated[
        str | None, typer.Option(help="Names, as in raw,long.  [default: the manifest's, else all]")
    ] = None,
    add_captions: Annotated[
        str | None, typer.Option(help="Add these captions to a store that is there; its images are not touched.")
    ] = None,
    data_root: DataRoot = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")] = "auto",
    precision: Annotated[str, typer.Option(help="What encoders compute in: float32, bfloat16, float16.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option(help="Run a model's own code; needs a pinned revision.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Translate encoders by torch.compile.")] = False,
    fast_jpeg: Annotated[
        bool, typer.Option("--fast-jpeg", help="Decode large JPEGs at reduced scale: features within cosine 0.999.")
    ] = False,
    workers: Annotated[
        str, typer.Option(help="Processes on this machine; auto: one a GPU, or one on the CPU.", metavar="auto|N")
    ] = "auto",
    worker: Annotated[
        str, typer.Option(help="Do only this worker's shards of the store, as in a Slurm array.", metavar="N/OF")
    ] = "1/1",
    engine: Annotated[
        str, typer.Option(help="local: this machine; ray: a Ray cluster.", metavar="local|ray")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray cluster.  [default: $RAY_ADDRESS, else this machine alone]")
    ] = None,
    retry: Annotated[
        str | None, typer.Option(help="failed: read again the images that could not be encoded.", metavar="failed")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Encode a data set into a store of features. Run it again to go on after a stop."""
    from sail_align.extract.check import is_here
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    if retry not in (None, "failed"):
        raise UserError(f"--retry {retry!r} is not known; the one thing to try again is: failed.")
    if retry and workers not in ("auto", "1"):
        raise UserError("--retry works in one process; leave --workers out, or share the shards with --worker N/OF.")
    about, root = find_manifest(manifest, data_root)
    if not add_captions and manifest in packaged_manifests() and not is_here(about, root):
        how = f"`sail-extract check {manifest}` says how to get them"
        raise UserError(f"The data of {manifest!r} are not under {root}; {how}.")

    from sail_align.extract.doctor import Verdict, diagnose_complete
    from sail_align.extract.encoders.catalogue import find_text, find_vision
    from sail_align.extract.encoders.load import require_files
    from sail_align.extract.encoders.pooling import require_known_image_pooling, require_text_pooling
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.engine import Crew, ray_crew
    from sail_align.extract.engine import run as run_job
    from sail_align.extract.job import Job, NamedImageEncoder, NamedTextEncoder, only_text_encoder
    from sail_align.extract.processes import LocalCrew, choose_devices
    from sail_align.extract.retry import retry_failed
    from sail_align.extract.sources import open_source
    from sail_align.extract.store import Store
    from sail_align.extract.worker import Share

    path = out or Path("features") / f"{about.name}.zarr"
    image_name, text_name = image_encoder or about.encoders.image, text_encoder or about.encoders.text
    if add_captions:
        if captions or image_encoder or retry:
            raise UserError("--add-captions leaves images alone; leave out --captions, --image-encoder and --retry.")
        known, chosen = Store.open(path).captions, add_captions.split(",")
        if not text_encoder and (recorded := only_text_encoder(Store.open(path))):
            text_name, text_pooling, precision = recorded
    else:
        known = open_source(about, root).all_captions
        chosen = captions.split(",") if captions else list(about.encoders.captions or known)
    names = tuple(name.strip() for name in chosen)
    for name in names:
        if name not in known:
            raise UserError(f"{about.name} has no caption {name!r}; it has {', '.join(known) or 'none'}.")
    Runtime.of(device, precision)
    encoders = [find_vision(image_name), *([find_text(text_name)] if names else [])]
    require_known_image_pooling(image_pooling, image_name)
    if names:
        require_text_pooling(text_pooling or find_text(text_name).pooling, text_name)
    devices, share = choose_devices(workers, device), Share.parse(worker)
    crew: Crew = LocalCrew(devices)
    if engine == "ray":
        crew = ray_crew(ray_address, workers, device)
    elif engine != "local" or ray_address:
        raise UserError(f"--engine {engine!r}: there are local and ray, and --ray-address goes with ray.")
    elif not (path / "zarr.json").exists():
        require_files(*encoders)  # of no use is a store that nothing can fill
    job = Job(
        manifest=about,
        data_root=root,
        store=path,
        image=None
        if add_captions
        else NamedImageEncoder(image_name, image_pooling, precision, trust_remote_code, compiled, fast_jpeg),
        text=NamedTextEncoder(text_name, text_pooling, precision, trust_remote_code, compiled) if names else None,
        captions=names,
    )

    def opened(store: Store) -> None:
        print_recaptions(store)
        expected = about.expected_rows or store.rows
        if store.rows != expected:
            typer.echo(f"note: {about.name} has {store.rows:,} samples here; its manifest expects {expected:,}.")

    summary = run_job(job, crew, share, opened, quiet=quiet)
    retried = retry_failed(job, share, devices[0], quiet=quiet) if retry else None
    store = Store.open(job.store)
    print_arrays(store)
    typer.echo(f"{store.path}: {summary}.")
    if retried:
        typer.echo(f"{store.path}: {retried}.")
    following = "sail-align fit --features"
    if diagnosis := diagnose_complete(store):
        broken = diagnosis.verdict is Verdict.BROKEN
        typer.echo(f"{'warning: ' if broken else ''}pairing check: {diagnosis.sentence}")
        following = "sail-extract doctor" if broken else following
    name = quote(str(store.path))
    if failed := sum(array.failed for array in store.images().values()):
        typer.echo(f"{failed:,} images could not be encoded; `sail-extract status --failed {name}` lists them.")
    if worker == "1/1":
        typer.echo(f"Next: {following} {name}")
    elif not all(array.complete for array in store.arrays()):
        typer.echo("The share of this worker is done; the rest of the store is left to others.")


def print_recaptions(store: "Store") -> None:
    """Print what came of joining captions from other tables, if any were."""
    from sail_align.extract.recaption_report import RecaptionReport

    report = RecaptionReport.read(store.path / "index")
    for line in report.lines() if report else ():
        typer.echo(line)


def print_arrays(store: "Store") -> None:
    """Print a line for each array: how much of it is done, and its rows by status."""
    for array in store.arrays():
        counts = ", ".join(f"{count:,} {label}" for label, count in sorted(array.counts.items()))
        typer.echo(f"  {array.path}: {len(array.markers)}/{len(array.shards)} shards, dim {array.dim}: {counts}")
