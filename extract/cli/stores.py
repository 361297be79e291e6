"""sail-extract status, verify, upgrade, doctor and overlap: questions to a store."""

from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.cli.options import StorePath, next_command
from sail_align.extract.cli.run import report_opened
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import BadResult, Device, Quiet, Result, with_json
from sail_align.extract.system.files import as_path, require_store

THRESHOLD = 0.85
"""Cosine above which images count as near-duplicates. With efficientnet-lite0, all of 250 photos cropped to 95 % or
mirrored are above it, as are 94 % of these saved again as JPEG of quality 60. Of 3 million pairs of other photos, only
one is: the same scene a moment later."""


@with_json
def status(
    store: StorePath,
    failed: Annotated[bool, typer.Option("--failed", help="List the rows that could not be encoded, and why.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --failed, also write them as parquet: key, url, image, array, status.")
    ] = None,
) -> Result:
    """Show what a store contains and how much of it is done."""
    if out and not failed:
        raise UserError("--out has no effect without --failed. Add it.")
    require_store(store)

    from sail_align.extract.quality.failed import describe_failed, list_failed, write_failed
    from sail_align.extract.store.hierarchy import STORE_FORMAT
    from sail_align.extract.store.store import Store

    opened = Store.open(store)
    if failed:
        found = list_failed(opened)
        for line in describe_failed(found):
            typer.echo(line)
        if out:
            typer.echo(f"wrote {out}: {write_failed(opened, out):,} rows")
        return {"store": str(store), "failed": found, "wrote": out}
    typer.echo(f"{store}: {opened.dataset}, {opened.rows:,} samples, captions {', '.join(opened.captions) or 'none'}")
    report_opened(None, opened)
    arrays = opened.arrays()
    for array in arrays:
        typer.echo(f"  {array.describe()}")
    if arrays and all(array.complete for array in arrays):
        typer.echo("complete" if opened.captions else "complete: image features only, because there are no captions")
    if opened.format < STORE_FORMAT:
        typer.echo(f"format {opened.format}; convert it with `{command('sail-extract', 'upgrade', store)}`")
    typer.echo(f"digest {opened.digest}")
    return opened.to_dict()


@with_json
def verify(
    store: StorePath,
    discard: Annotated[
        bool, typer.Option("--discard", help="Discard the commits of damaged shards, so that `run` redoes them.")
    ] = False,
) -> Result:
    """Recompute every hash of a store, and test its encoders if they are here. Exits with 1 on damage."""
    require_store(store)

    from sail_align.extract.quality.verify import verify_store

    problems, findings = 0, []
    for text, damage in verify_store(store, discard=discard):
        typer.echo(text)
        findings.append({"finding": text, "is_damage": damage})
        problems += damage
    typer.echo(f"{store}: {problems or 'no'} problem{'s' if problems != 1 else ''} found.")
    result = {"store": str(store), "problems": problems, "findings": findings}
    if problems:
        raise BadResult(result)
    return result


@with_json
def upgrade(store: StorePath, quiet: Quiet = False) -> Result:
    """Convert a store of an earlier format. Features keep their bytes; a stopped conversion is continued."""
    require_store(store)

    from sail_align.extract.store.hierarchy import STORE_FORMAT
    from sail_align.extract.store.store import Store
    from sail_align.extract.store.upgrade import upgrade_store

    done = upgrade_store(Store.open(store), quiet=quiet)
    typer.echo(f"{store}: {'converted to' if done else 'already has'} format {STORE_FORMAT}.")
    return {"store": str(store), "format": STORE_FORMAT, "converted": done}


@with_json
def doctor(store: StorePath) -> Result:
    """Test from the features whether captions belong to their images. Exits with 1 if they do not."""
    require_store(store)

    from sail_align.extract.quality.doctor import diagnose
    from sail_align.extract.quality.pairing import Verdict
    from sail_align.extract.store.store import Store

    diagnosis = diagnose(Store.open(store))
    for line in diagnosis.lines:
        typer.echo(f"  {line}")
    typer.echo(f"{store}: {diagnosis.summary}")
    result = {"store": str(store), **diagnosis.to_dict()}
    if diagnosis.verdict is Verdict.BROKEN:
        raise BadResult(result)
    return result


@with_json
def overlap(
    train: Annotated[
        Path, typer.Argument(metavar="TRAIN", help="Store to train on.", show_default=False, parser=as_path)
    ],
    evaluation: Annotated[
        Path, typer.Argument(metavar="EVAL", help="Store to score on.", show_default=False, parser=as_path)
    ],
    threshold: Annotated[float, typer.Option(help="Lowest cosine of near-duplicates.")] = THRESHOLD,
    out: Annotated[Path | None, typer.Option(help="Write the list for `sail-align fit --exclude`.")] = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="Image encoder to use if a store has more than one.")
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> Result:
    """Find near-duplicates of evaluation images in a training store."""
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold is invalid: got {threshold:g}, expected a cosine between 0 and 1.")
    for store in (train, evaluation):
        require_store(store)

    from sail_align.extract.encoders.runtime import Runtime
    from sail_align.extract.quality.overlap import Overlap
    from sail_align.extract.store.store import Store

    where = str(Runtime.of(device, "float32").device)
    found = Overlap.between(Store.open(train), Store.open(evaluation), encoder=image_encoder, device=where, quiet=quiet)
    rows = found.closest(threshold)
    for line in found.describe(rows):
        typer.echo(line)
    typer.echo(
        f"{train}: {len(rows):,} of {found.train.rows:,} images are near-duplicates of images of {evaluation} "
        f"(cosine {threshold:g} or more)."
    )
    following = next_command(found.train, "--exclude", out, image=image_encoder) if out else None
    if out:
        found.write(out, rows)
        typer.echo(f"wrote {out}\nNext: {following}")
    about = {"train": str(train), "evaluation": str(evaluation), "threshold": threshold}
    return {**about, **found.to_dict(rows), "wrote": out, "next": following}
