"""sail-extract: run frozen encoders over a data set once and keep the features in a store."""

import os
from pathlib import Path
from shlex import quote
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.extract.errors import UserError, run_command
from sail_align.extract.system.files import as_path, require_store
from sail_align.extract.system.memory import wait_without_spinning

if TYPE_CHECKING:
    from sail_align.extract.store.store import Store

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
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    if retry not in (None, "failed"):
        raise UserError(f"--retry {retry!r} is not known; the one thing to try again is: failed.")
    if retry and workers not in ("auto", "1"):
        raise UserError("--retry works in one process; leave --workers out, or share the shards with --worker N/OF.")
    about, root = find_manifest(manifest, data_root)
    if not add_captions and manifest in packaged_manifests() and not about.is_here(root):
        how = f"`sail-extract check {manifest}` says how to get them"
        raise UserError(f"The data of {manifest!r} are not under {root}; {how}.")

    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.executor.job import Job, recorded_text_encoder
    from sail_align.extract.executor.local import LocalExecutor
    from sail_align.extract.executor.retry import retry_failed
    from sail_align.extract.executor.run import Executor, run_job
    from sail_align.extract.executor.worker import Share
    from sail_align.extract.quality.doctor import Verdict, diagnose_complete
    from sail_align.extract.store.store import Store

    path = out or Path("features") / f"{about.name}.zarr"
    image_name, text_name = image_encoder or about.encoders.image, text_encoder or about.encoders.text
    if add_captions:
        if captions or image_encoder or retry:
            raise UserError("--add-captions leaves images alone; leave out --captions, --image-encoder and --retry.")
        known, chosen = Store.open(path).captions, add_captions.split(",")
        if not text_encoder and (recorded := recorded_text_encoder(Store.open(path))):
            text_name, text_pooling, precision = recorded.name, recorded.pooling, recorded.precision
    else:
        known = about.open_source(root).all_captions
        chosen = captions.split(",") if captions else list(about.encoders.captions or known)
    names = tuple(name.strip() for name in chosen)
    for name in names:
        if name not in known:
            raise UserError(f"{about.name} has no caption {name!r}; it has {', '.join(known) or 'none'}.")
    Runtime.of(device, precision)
    image = text = None
    if not add_captions:
        image = ImageEncoderConfig(
            image_name, image_pooling, precision, trust_remote_code, compiled, fast_jpeg=fast_jpeg
        )
    if names:
        text = TextEncoderConfig(text_name, text_pooling, precision, trust_remote_code, compiled)
    share = Share.parse(worker)
    executor: Executor = LocalExecutor.choose(workers, device)
    if engine == "ray":
        from sail_align.extract.executor.ray_cluster import RayCluster

        executor = RayCluster(ray_address, workers, device)
    elif engine != "local" or ray_address:
        raise UserError(f"--engine {engine!r}: there are local and ray, and --ray-address goes with ray.")
    elif not (path / "zarr.json").exists():
        for encoder in filter(None, (image, text)):
            encoder.download()  # before the store is created
    job = Job(
        manifest=about,
        data_root=root,
        store=path,
        image=image,
        text=text,
        captions=names,
    )

    def opened(store: Store) -> None:
        print_recaptions(store)
        expected = about.expected_rows or store.rows
        if store.rows != expected:
            typer.echo(f"note: {about.name} has {store.rows:,} samples here; its manifest expects {expected:,}.")

    summary = run_job(job, executor, share, opened, quiet=quiet)
    retried = retry_failed(job, share, device, quiet=quiet) if retry else None
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
    if failed := sum(sum(array.failed_counts.values()) for array in store.images().values()):
        typer.echo(f"{failed:,} images could not be encoded; `sail-extract status --failed {name}` lists them.")
    if worker == "1/1":
        typer.echo(f"Next: {following} {name}")
    elif not all(array.complete for array in store.arrays()):
        typer.echo("The share of this worker is done; the rest of the store is left to others.")


def print_recaptions(store: "Store") -> None:
    """Print what came of joining captions from other tables, if any were."""
    from sail_align.extract.store.recaptions import RecaptionReport

    report = RecaptionReport.read(store.path / "index")
    for line in report.lines() if report else ():
        typer.echo(line)


def print_arrays(store: "Store") -> None:
    """Print a line for each array: how much of it is done, and its rows by status."""
    for array in store.arrays():
        counts = ", ".join(f"{count:,} {label}" for label, count in sorted(array.counts.items()))
        typer.echo(f"  {array.path}: {len(array.markers)}/{len(array.shards)} shards, dim {array.dim}: {counts}")


THRESHOLD = 0.85
"""Of 250 photos through efficientnet-lite0, every one cropped to 95 % or mirrored, and 94 % of those saved again as
JPEG of quality 60, are above it; of 3 million pairs of other photos only one, of the same scene a moment later."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command()(run)

StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="A feature store.", show_default=False, parser=as_path)
]


@app.command()
def check(
    manifest: Annotated[
        str | None, typer.Argument(help="A packaged manifest's name or a .yaml file.  [default: all packaged ones]")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Say what of a data set is missing, and how to get it. Exits 1 if it is not ready."""
    from sail_align.extract.check import check as check_data_set
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    if manifest is None:
        for name in packaged_manifests():
            about, root = find_manifest(name, data_root)
            kind = about.task.kind if about.task else about.purpose
            rows = f"{about.expected_rows:,}" if about.expected_rows else ""
            there = "here   " if about.is_here(root) else "missing"
            typer.echo(f"{there}  {name:<18} {kind:<15} {rows:>10}  {about.title}")
        typer.echo("`sail-extract check NAME` looks closer, and says how to get what is missing.")
        return
    about, root = find_manifest(manifest, data_root)
    typer.echo(f"{about.name}: {about.title}\nlicence: {about.licence}\ndata root: {root}")
    ready = True
    for finding in check_data_set(about, root):
        typer.echo(f"  {'ok ' if finding.good else 'NOT'}  {finding.text}")
        ready &= finding.good
    if not ready:
        typer.echo(f"not ready; to get it:\n{indent(about.get.strip(), '    ')}")
        raise typer.Exit(1)
    typer.echo("ready")


@app.command()
def download(
    manifest: Annotated[str, typer.Argument(help="A packaged manifest's name, such as cc12m, or a .yaml file.")],
    data_root: DataRoot = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of img2dataset.  [default: one a core]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Downloads at a time, a process.")] = 64,
    quiet: Quiet = False,
) -> None:
    """Download a training set's images with img2dataset. Run it again to go on after a stop."""
    from sail_align.extract.download import download_images
    from sail_align.extract.manifest import find_manifest

    about, root = find_manifest(manifest, data_root)
    processes = processes or os.cpu_count() or 1
    done = download_images(about, root, processes=processes, threads=threads, quiet=quiet)
    typer.echo(f"{about.name}: {done}\nNext: sail-extract run {quote(manifest)}")


@app.command()
def status(
    store: StorePath,
    failed: Annotated[bool, typer.Option("--failed", help="List the rows that could not be encoded, and why.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --failed, write them as parquet: key, url, image, array, status.")
    ] = None,
) -> None:
    """Say what a store holds and how much of it is done."""
    if out and not failed:
        raise UserError("--out has no effect without --failed; add it.")
    require_store(store)

    from sail_align.extract.quality.failed import describe_failed, write_failed
    from sail_align.extract.store.store import Store

    opened = Store.open(store)
    if failed:
        for line in describe_failed(opened):
            typer.echo(line)
        if out:
            typer.echo(f"wrote {out}: {write_failed(opened, out):,} rows")
        return
    typer.echo(f"{store}: {opened.dataset}, {opened.rows:,} samples, captions {', '.join(opened.captions) or 'none'}")
    print_recaptions(opened)
    print_arrays(opened)
    typer.echo(f"digest {opened.digest}")


@app.command()
def verify(
    store: StorePath,
    discard: Annotated[
        bool, typer.Option(help="Take damaged shards' commits back, so that `run` redoes them.")
    ] = False,
) -> None:
    """Recompute every hash, and golden vectors where they can be. Exits 1 on damage."""
    require_store(store)

    from sail_align.extract.quality.verify import verify_store

    problems = 0
    for finding in verify_store(store, discard=discard):
        typer.echo(str(finding))
        problems += finding.damage
    typer.echo(f"{store}: {problems or 'no'} problem{'s' if problems != 1 else ''} found.")
    if problems:
        raise typer.Exit(1)


@app.command()
def doctor(store: StorePath) -> None:
    """Ask the features whether captions belong to their images. Exits 1 if they do not."""
    require_store(store)

    from sail_align.extract.quality.doctor import Verdict, diagnose
    from sail_align.extract.store.store import Store

    diagnosis = diagnose(Store.open(store))
    for line in diagnosis.lines:
        typer.echo(f"  {line}")
    typer.echo(f"{store}: {diagnosis.sentence}")
    if diagnosis.verdict is Verdict.BROKEN:
        raise typer.Exit(1)


@app.command()
def overlap(
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="The store to train on.", show_default=False)],
    evaluation: Annotated[Path, typer.Argument(metavar="EVAL", help="The store to score on.", show_default=False)],
    threshold: Annotated[float, typer.Option(help="Least cosine of image features to count.")] = THRESHOLD,
    out: Annotated[Path | None, typer.Option(help="Write the list for `sail-align fit --exclude`.")] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Find near-duplicates of evaluation images in a training store."""
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold:g} is no cosine between 0 and 1; give one such as {THRESHOLD}.")
    for store in (train, evaluation):
        require_store(store)

    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.quality.overlap import find_overlap, write_exclusions
    from sail_align.extract.store.store import Store

    where = str(Runtime.of(device, "float32").device)
    found = find_overlap(Store.open(train), Store.open(evaluation), encoder=image_encoder, device=where, quiet=quiet)
    rows = found.closest(threshold)
    for line in found.describe(rows):
        typer.echo(line)
    typer.echo(
        f"{train}: {len(rows):,} of {found.train.rows:,} images are near-duplicates of images of {evaluation} "
        f"(cosine {threshold:g} or more)."
    )
    if out:
        write_exclusions(out, found, rows)
        typer.echo(f"wrote {out}\nNext: sail-align fit --features {quote(str(train))} --exclude {quote(str(out))}")


def main() -> None:
    """Entry point."""
    wait_without_spinning()
    run_command(app)
