"""sail-align import-released and export: conversion from and to other formats."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.align.cli.options import WhichCheckpoint
from sail_align.align.runs.folder import RunFolder
from sail_align.extract.errors import UserError, command
from sail_align.extract.system.command_line import Result, with_json

if TYPE_CHECKING:
    from sail_align.align.hub.model_card import Record
    from sail_align.align.runs.checkpoint import Run

FORMATS = ("hub-folder", "sentence-transformers", "onnx")
Pooling = Annotated[str | None, typer.Option(help="Pooling of that encoder's features.  [default: its own]")]
_OUT = "Folder of the run.  [default: runs/<name of the file>, with -2, -3 … added if that is another import]"
_TO = "Folder for the Hugging Face hub, folder for sentence-transformers, or ONNX graphs for programs without PyTorch."


@with_json
def import_released(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Heads published by the paper's authors.", show_default=False)
    ],
    encoders: Annotated[
        str, typer.Option(metavar="IMAGE,TEXT", help="Encoders on whose features the heads were trained.")
    ] = "dinov2-large,gte-large",
    image_pooling: Pooling = None,
    text_pooling: Pooling = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help=_OUT)] = None,
    device: Annotated[str, typer.Option(help="Device to test the encoders on: auto, cpu, cuda …")] = "auto",
) -> Result:
    """Import heads published by the paper's authors as a run. It can be evaluated like any other."""
    names = [name.strip() for name in encoders.split(",")]
    if len(names) != 2 or not all(names):
        raise UserError(f"--encoders is invalid: got {encoders!r}, expected IMAGE,TEXT as in dinov2-large,gte-large.")
    if not file.is_file():
        raise UserError(f"{file} does not exist. Name a file published by the paper's authors.")

    from sail_align.align.hub.released import CLAMP, Released
    from sail_align.align.runs.checkpoint import Checkpoint
    from sail_align.align.runs.claim import claim_run
    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
    from sail_align.extract.system.files import report_write_errors

    released = Released.read(file)
    image = ImageEncoderConfig(names[0], pooling=image_pooling).load(device).identity
    text = TextEncoderConfig(names[1], pooling=text_pooling).load(device).identity
    record = released.record(image, text)
    if released.needs_clamp:
        typer.echo(
            f"note: The authors' code clamps hidden units at ±{CLAMP:,}. These weights may reach that; they are not "
            "clamped here."
        )
    claim = claim_run(out or Path("runs") / file.stem, record["settings"], numbered=out is None)
    run = claim.path
    if not claim.finished:
        with report_write_errors(run):
            Checkpoint.write(RunFolder(run).checkpoint(0), released.model.state_dict(), record, step=0)
    shape, sha256 = released.architecture, released.imported["sha256"]
    typer.echo(
        f"{'already imported:' if claim.finished else 'wrote'} {run}: {shape.head} heads from {shape.image_dim} and "
        f"{shape.text_dim} to {shape.dim} dimensions, {shape.expansion} × hidden; file {sha256[:12]}"
    )
    following = command("sail-eval", "all", "--run", run)
    typer.echo(f"Next: {following}")
    return {"run": str(run), "imported": released.imported, "architecture": asdict(shape), "next": following}


@with_json
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or a checkpoint.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="|".join(FORMATS), help=_TO)] = "hub-folder",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder.  [default: exports/<run>-<format>]")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the heads for the model card: apache-2.0 …  [default: unknown]")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --to onnx: graphs of the encoders with their heads.")
    ] = False,
    checkpoint: WhichCheckpoint = None,
) -> Result:
    """Export a run for the hub, for sentence-transformers or as ONNX.

    ONNX graphs have the heads alone, or with --whole the encoders, too.
    """
    if to not in FORMATS:
        raise UserError(f"--to is invalid: got {to!r}, expected {', '.join(FORMATS)}.")
    if to == "onnx" and licence:
        raise UserError("--licence has no effect with --to onnx, which has no model card. Leave one of them out.")
    if whole and to != "onnx":
        raise UserError(f"--whole has no effect with --to {to}, only with --to onnx. Leave one of them out.")
    RunFolder(run).require()
    name = f"{run.resolve().name}{'-last' if checkpoint == 'last' else ''}"
    folder = out or Path("exports") / f"{name}-{to}{'-whole' if whole else ''}"

    from sail_align.align.runs.checkpoint import checkpoint_path, load_run

    run = checkpoint_path(run, checkpoint)
    if to != "onnx":
        write = _write_hub_folder if to == "hub-folder" else _write_sentence_transformers
        write(load_run(run), folder, licence or "unknown")
        return {"run": str(run), "format": to, "wrote": str(folder)}

    if whole:
        from sail_align.align.hub.onnx_whole import write_whole

        difference, files = write_whole(run, folder), "image.onnx, text.onnx, tokenizer and README.md"
    else:
        from sail_align.align.hub.onnx_heads import write_onnx

        difference, files = write_onnx(run, folder), "image_head.onnx and text_head.onnx, also for float16"
    typer.echo(f"wrote {folder}: {files}, within {difference:.1g} of PyTorch's embeddings")
    return {"run": str(run), "format": to, "wrote": str(folder), "largest_difference": difference}


def _read_scores(run: "Run", licence: str) -> "list[Record]":
    """Return the scores for the model card, and note what it lacks."""
    from sail_align.align.hub.model_card import read_scores

    scores, outdated = read_scores(run)
    how = f"Run `{command('sail-eval', 'all', '--run', run.path)}` first to include"
    if outdated:
        typer.echo(f"note: Left out the scores in {run.path}, which are for other weights. {how} new ones.")
    elif not scores:
        typer.echo(f"note: {run.path} has no scores for the model card. {how} some.")
    if licence == "unknown":
        typer.echo("note: The model card says that the licence is unknown. Name it with --licence.")
    return scores


def _write_hub_folder(run: "Run", folder: Path, licence: str) -> None:
    from sail_align.align.hub.folder import write_hub_folder
    from sail_align.align.hub.model_card import model_card
    from sail_align.extract.encoders.identity import require_known

    require_known(run.image, run.text)
    scores = _read_scores(run, licence)
    for side, identity in (("image", run.image), ("text", run.text)):
        if identity.location:
            typer.echo(
                f"note: The {side} encoder is a local folder and is not exported. Users of the export must pass its "
                f"location: load(…, {side}_folder=…)."
            )
    write_hub_folder(run, folder, model_card(run, scores, licence))
    sets = f"with scores of {len(scores)} set{'s' * (len(scores) > 1)}" if scores else "without scores"
    typer.echo(f"wrote {folder}: heads, config and a model card {sets}")
    name = RunFolder(run.path).run.path.resolve().name
    typer.echo(f"To publish it: hf upload OWNER/{command(name, folder)}")


def _write_sentence_transformers(run: "Run", folder: Path, licence: str) -> None:
    from sail_align.align.hub.model_card import model_card
    from sail_align.align.hub.sentence_transformers import write_sentence_transformers

    scores = _read_scores(run, licence)

    def card(usage: str) -> str:
        return model_card(run, scores, licence, library="sentence-transformers", usage=usage)

    written = write_sentence_transformers(run, folder, card)
    if written.not_native:
        load = f"SentenceTransformer({str(folder)!r}, trust_remote_code=True)"
        kind = f"with a module of sail-align, because {written.not_native}"
    else:
        load = f"SentenceTransformer({str(folder)!r})"
        kind = f"modules of sentence-transformers alone, within {written.difference:.1g} of sail-align's embeddings"
    typer.echo(f"wrote {folder}: {kind}")
    typer.echo(f"Load it with: {load}")
