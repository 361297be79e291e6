"""sail-extract: run frozen encoders over a data set once and keep the features in a store."""

import os
from pathlib import Path
from shlex import quote
from textwrap import indent
from typing import Annotated

import typer

from sail_align.extract.cli_run import DataRoot, Quiet, print_arrays, print_recaptions, run
from sail_align.extract.errors import UserError, run_command
from sail_align.extract.files import as_path, require_store
from sail_align.extract.memory import wait_without_spinning

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
    from sail_align.extract.check import is_here, look
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    if manifest is None:
        for name in packaged_manifests():
            about, root = find_manifest(name, data_root)
            kind = about.task.kind if about.task else about.purpose
            rows = f"{about.expected_rows:,}" if about.expected_rows else ""
            there = "here   " if is_here(about, root) else "missing"
            typer.echo(f"{there}  {name:<18} {kind:<15} {rows:>10}  {about.title}")
        typer.echo("`sail-extract check NAME` looks closer, and says how to get what is missing.")
        return
    about, root = find_manifest(manifest, data_root)
    typer.echo(f"{about.name}: {about.title}\nlicence: {about.licence}\ndata root: {root}")
    ready = True
    for finding in look(about, root):
        typer.echo(f"  {'ok ' if finding.good else 'NOT'}  {finding.what}")
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

    from sail_align.extract.failed import describe_failed, write_failed
    from sail_align.extract.store import Store

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

    from sail_align.extract.verify import verify_store

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

    from sail_align.extract.doctor import Verdict, diagnose
    from sail_align.extract.store import Store

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
    from sail_align.extract.overlap import find_overlap, write_exclusions
    from sail_align.extract.store import Store

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
