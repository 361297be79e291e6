"""sail-align import-released and export: what comes from elsewhere, and what goes there."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.align.runs.folder import RunFolder
from sail_align.extract.errors import UserError

if TYPE_CHECKING:
    from sail_align.align.runs.checkpoint import Run

FORMS = ("hub-folder", "onnx")


def import_released(
    file: Annotated[Path, typer.Argument(help="The heads as their authors published them.", show_default=False)],
    encoders: Annotated[
        str, typer.Option(metavar="IMAGE,TEXT", help="Those whose features the heads were trained on.")
    ] = "dinov2-large,gte-large",
    image_pooling: Annotated[str | None, typer.Option(help="[default: the encoder's own]")] = None,
    text_pooling: Annotated[str | None, typer.Option(help="[default: the encoder's own]")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The run's folder.  [default: runs/<file's name>; where that is another import, -2, -3 … behind it]",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the encoders are tried: cpu, cuda …; auto.")] = "auto",
) -> None:
    """Make a run of heads that the paper's authors published. It is evaluated like one trained here."""
    names = [name.strip() for name in encoders.split(",")]
    if len(names) != 2 or not all(names):
        raise UserError(f"--encoders {encoders!r} is not an image and a text encoder; write dinov2-large,gte-large.")
    if not file.is_file():
        raise UserError(f"{file} is not there; name the file that the authors published.")

    from sail_align.align.hub.released import CLAMP, read_released
    from sail_align.align.runs.checkpoint import write_checkpoint
    from sail_align.align.runs.claim import claim_run
    from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
    from sail_align.extract.system.files import report_write_errors

    released = read_released(file)
    image = ImageEncoderConfig(names[0], pooling=image_pooling).load(device).identity
    text = TextEncoderConfig(names[1], pooling=text_pooling).load(device).identity
    released.require_encoders(image, text)
    if released.needs_clamp:
        typer.echo(
            f"note: their program clamps hidden units at ±{CLAMP:,}, which these weights may reach; ours does not."
        )
    claim = claim_run(out or Path("runs") / file.stem, released.settings(image, text), numbered=out is None)
    run = claim.path
    if not claim.finished:
        with report_write_errors(run):
            record = released.checkpoint_record(image, text)
            write_checkpoint(RunFolder(run).checkpoint(0), released.model.state_dict(), record, step=0)
    shape = released.architecture
    said = "this import is there:" if claim.finished else "wrote"
    typer.echo(
        f"{said} {run}: {shape.head} heads, {shape.image_dim} and {shape.text_dim} numbers to {shape.dim}, "
        f"{shape.expansion} × hidden; file {released.sha256[:12]}"
    )
    typer.echo(f"Next: sail-eval all --run {run}")


def export(
    run: Annotated[Path, typer.Argument(help="A run of sail-align.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMS), help="For the Hugging Face hub, or the heads alone for programs without PyTorch."
        ),
    ] = "hub-folder",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder.  [default: exports/<run's name>-<form>]")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(help="Of the heads, for the card, as the hub writes it: apache-2.0 …  [default: unknown]"),
    ] = None,
) -> None:
    """Write a run's heads for use elsewhere: a folder for the hub with a model card, or ONNX graphs."""
    if to not in FORMS:
        raise UserError(f"--to {to!r} is none of: {', '.join(FORMS)}.")

    if to == "onnx" and licence:
        raise UserError("--licence is for the card of a hub-folder; leave it out with --to onnx.")

    RunFolder(run).require()

    from sail_align.align.runs.checkpoint import load_run

    if to == "onnx":
        from sail_align.align.hub.onnx_heads import require_onnx, write_onnx

        require_onnx()
        loaded = load_run(run)
        folder = out or Path("exports") / f"{run.resolve().name}-onnx"
        farthest = write_onnx(loaded, folder)
        typer.echo(f"wrote {folder}: image_head.onnx and text_head.onnx, within {farthest:.1g} of PyTorch's embeddings")
        return
    loaded = load_run(run)
    _write_hub_folder(loaded, out or Path("exports") / f"{run.resolve().name}-hub-folder", licence or "unknown")


def _write_hub_folder(run: "Run", folder: Path, licence: str) -> None:
    from sail_align.align.hub.folder import write_hub_folder
    from sail_align.align.hub.model_card import model_card, read_scores

    scores, outdated = read_scores(run)
    how = f"run `sail-eval all --run {run.path}`"
    if outdated:
        typer.echo(f"note: the scores in {run.path} are of other weights and are left out; {how}.")
    elif not scores:
        typer.echo(f"note: {run.path} has no scores for its card; {how} first to have some.")
    if licence == "unknown":
        typer.echo("note: the card says that the licence is unknown; say what it is with --licence.")
    for side, identity in (("image", run.image), ("text", run.text)):
        if identity.location:
            typer.echo(
                f"note: the {side} encoder is a folder of this machine and does not go along; who loads the export "
                f"says where theirs lies: load(…, {side}_folder=…)."
            )
    write_hub_folder(run, folder, model_card(run, scores, licence))
    typer.echo(f"wrote {folder}: heads, config and a model card with {len(scores)} scored sets")
    typer.echo(f"Next: hf upload <owner>/{RunFolder(run.path).run.path.resolve().name} {folder}")
