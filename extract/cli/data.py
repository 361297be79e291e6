"""sail-extract init, check and download: describe a data set, see whether it is here, and get it."""

from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer

from sail_align.extract.cli.run import CaptionColumns, ImageColumn, Images, report_recognised
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import DataRoot, Quiet


def init(
    data: Annotated[
        Path, typer.Argument(help="Path of your own data, as `run` takes it.", metavar="DATA", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="File of the manifest.  [default: NAME.yaml]")] = None,
    image_column: ImageColumn = None,
    caption_columns: CaptionColumns = None,
    images: Images = None,
) -> None:
    """Write a manifest of your own data, to read or edit before `run`."""
    from sail_align.extract.manifest import is_manifest
    from sail_align.extract.recognise.columns import Choices
    from sail_align.extract.recognise.record import Recognised

    if out and not is_manifest(str(out)):
        raise UserError(f"--out {out} is invalid: expected a file that ends in .yaml.")
    if is_manifest(str(data)):
        raise UserError(f"{data} is a manifest. Give the path of the data instead.")
    columns = tuple(name.strip() for name in caption_columns.split(",")) if caption_columns else ()
    recognised = Recognised.of(data, Choices(image_column, columns, Path(images) if images else None))
    file = out or Path(f"{recognised.name}.yaml")
    report_recognised(recognised, file, recognised.write(file))
    typer.echo(f"Next: {command('sail-extract', 'run', file)}")


def check(
    manifest: Annotated[
        str | None, typer.Argument(help="Name of a packaged manifest, or a .yaml file.  [default: all packaged ones]")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Show what is missing of a data set and how to get it. Exits with 1 if it is incomplete."""
    from sail_align.extract.check import check as check_data_set
    from sail_align.extract.manifest import find_manifest, packaged_manifests

    if manifest is None:
        for name in packaged_manifests():
            about, root = find_manifest(name, data_root)
            kind = about.task.kind if about.task else about.purpose
            rows = f"{about.expected_rows:,}" if about.expected_rows else ""
            status = "here   " if about.is_here(root) else "missing"
            typer.echo(f"{status}  {name:<18} {kind:<15} {rows:>10}  {about.title}")
        typer.echo("`sail-extract check NAME` shows details and how to get what is missing.")
        return
    about, root = find_manifest(manifest, data_root)
    typer.echo(about.name if about.title == about.name else f"{about.name}: {about.title}")
    if about.licence:
        typer.echo(f"licence: {about.licence}")
    typer.echo(f"data root: {root}")
    ready = True
    for good, text in check_data_set(about, root):
        typer.echo(f"  {'ok ' if good else 'NOT'}  {text}")
        ready &= good
    if not ready:
        typer.echo(f"not ready; to get it:\n{indent(about.get.strip(), '    ')}" if about.get else "not ready")
        raise typer.Exit(1)
    typer.echo("ready")


def download(
    manifest: Annotated[str, typer.Argument(help="Name of a packaged manifest, such as cc12m, or a .yaml file.")],
    data_root: DataRoot = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of img2dataset.  [default: one per core]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Simultaneous downloads per process.  [default: 64]")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Download the images of a training set from their URLs, with img2dataset. Rerun the same command to resume."""
    from sail_align.extract.download import download_images
    from sail_align.extract.manifest import find_manifest

    about, root = find_manifest(manifest, data_root)
    done = download_images(about, root, processes=processes, threads=threads, quiet=quiet)
    typer.echo(f"{about.name}: {done}\nNext: {command('sail-extract', 'run', manifest)}")
