"""sail-align import-released: what comes from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.errors import UserError


def import_released(
    file: Annotated[Path, typer.Argument(help="The heads as their authors published them.", show_default=False)],
    encoders: Annotated[
        str, typer.Option(metavar="IMAGE,TEXT", help="Those whose features the heads were trained on.")
    ] = "dinov2-large,gte-large",
    image_pooling: Annotated[str | None, typer.Option(help="[default: the encoder's own]")] = None,
    text_pooling: Annotated[str | None, typer.Option(help="[default: the encoder's own]")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The run's folder; if it is taken, RUN-2 …  [default: runs/<file's name>]"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the encoders are tried: cpu, cuda …; auto.")] = "auto",
) -> None:
    """Make a run of heads that the paper's authors published. It is evaluated like one trained here."""
    names = [name.strip() for name in encoders.split(",")]
    if len(names) != 2 or not all(names):
        raise UserError(f"--encoders {encoders!r} is not an image and a text encoder; write dinov2-large,gte-large.")

    from sail_align.align.checkpoint import save_checkpoint
    from sail_align.align.released import CLAMP, read_released
    from sail_align.align.runs import claim_run
    from sail_align.extract.encoders.load import load_image_encoder, load_text_encoder

    released = read_released(file)
    image = load_image_encoder(names[0], pooling=image_pooling, device=device).identity
    text = load_text_encoder(names[1], pooling=text_pooling, device=device).identity
    released.require_encoders(image, text)
    if released.needs_clamp:
        typer.echo(
            f"note: their program clamps hidden units at ±{CLAMP:,}, which these weights may reach; ours does not."
        )
    run, _, finished = claim_run(out or Path("runs") / file.stem, released.settings(image, text))
    if finished:
        typer.echo(f"note: {finished} is the same import.")
    save_checkpoint(run, released.model, released.checkpoint_record(image, text), step=0, optimizer=None)
    shape = released.architecture
    typer.echo(
        f"wrote {run}: {shape.head} heads, {shape.image_dim} and {shape.text_dim} numbers to {shape.dim}, "
        f"{shape.expansion} × hidden; file {released.sha256[:12]}"
    )
    typer.echo(f"Next: sail-eval all --run {run}")
