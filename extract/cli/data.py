"""sail-extract init, check and download: describe a data set, see whether it is here, and get it."""

from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from sail_align.extract.cli.run import CaptionColumns, ImageColumn, Images, report_recognised
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import BadResult, DataRoot, Quiet, Result, with_json


@with_json
def init(
    data: Annotated[
        Path, typer.Argument(help="Path of your own data, as `run` takes it.", metavar="DATA", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="File of the manifest.  [default: NAME.yaml]")] = None,
    image_column: ImageColumn = None,
    caption_columns: CaptionColumns = None,
    images: Images = None,
) -> Result:
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
    following = command("sail-extract", "run", file)
    typer.echo(f"Next: {following}")
    return {"name": recognised.name, "wrote": str(file), "next": following}


@with_json
def check(
    manifest: Annotated[
        str | None,
        typer.Argument(
            metavar="MANIFEST", help="Name of a packaged manifest, or a .yaml file.  [default: list the packaged ones]"
        ),
    ] = None,
    data_root: DataRoot = None,
) -> Result:
    """Show what is missing of a data set and how to get it, or list the published ones. Exits with 1 if incomplete."""
    from sail_align.extract.check import check as check_data_set
    from sail_align.extract.manifest import find_manifest, packaged_manifests
    from sail_align.extract.needs import describe_needs

    if manifest is None:
        listed = []
        for name in packaged_manifests():
            about, root = find_manifest(name, data_root)
            kind = about.task.kind if about.task else about.purpose
            here = about.is_here(root)
            rows = f"{about.expected_rows:,}" if about.expected_rows else ""
            typer.echo(f"{'here   ' if here else 'missing'}  {name:<18} {kind:<15} {rows:>10}  {about.title}")
            listed.append({"name": name, "here": here, "kind": kind, "rows": about.expected_rows, "title": about.title})
        typer.echo("`sail-extract check NAME` shows details and how to get what is missing.")
        return {"data_sets": listed}
    about, root = find_manifest(manifest, data_root)
    typer.echo(about.name if about.title == about.name else f"{about.name}: {about.title}")
    if about.licence:
        typer.echo(f"licence: {about.licence}")
    typer.echo(f"data root: {root.absolute()}")
    findings = []
    for good, text in check_data_set(about, root):
        typer.echo(f"  {'ok ' if good else 'NOT'}  {text}")
        findings.append({"good": good, "finding": text})
    missing, ready = not about.is_here(root), all(each["good"] for each in findings)
    result: dict[str, Any] = {
        "name": about.name,
        "title": about.title,
        "licence": about.licence,
        "data_root": str(root.absolute()),
    }
    result |= {"ready": ready, "missing": missing, "findings": findings, "get": about.get}
    if ready:
        typer.echo("ready")
        return result
    typer.echo("not ready: files are missing" if missing else "not ready: the files here are not what is expected")
    if missing:
        for line in (
            *(["to get them:", indent(about.get.strip(), "    ")] if about.get else []),
            *describe_needs(about, root),
        ):
            typer.echo(line)
    raise BadResult(result)


@with_json
def download(
    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST",
            help="Name of a packaged manifest, such as cc12m, or a .yaml file.",
            show_default=False,
        ),
    ],
    data_root: DataRoot = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of img2dataset.  [default: one per core]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Simultaneous downloads per process.  [default: 64]")
    ] = None,
    quiet: Quiet = False,
) -> Result:
    """Download the images of a training set from their URLs, with img2dataset. Rerun the same command to resume."""
    from sail_align.extract.download import download_images
    from sail_align.extract.manifest import find_manifest

    about, root = find_manifest(manifest, data_root)
    root_given = ["--data-root", data_root] if data_root else []
    done = download_images(about, root, processes=processes, threads=threads, quiet=quiet)
    typer.echo(f"{about.name}: {done}\nNext: {command('sail-extract', 'run', manifest, *root_given)}")
    return {"name": about.name, **asdict(done)}
