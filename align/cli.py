"""sail-align: train the heads that bring frozen image and text features into one space."""

import time
from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.errors import run_command

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

PRESETS_HELP = (
    "Settings for the options below that are not given: paper (batch 36864, Lion 1e-5, 50 epochs) or small (batch 512, "
    "Lion 3e-4, warm-up 0.1, dropout 0.4, 60 epochs).  [default: small below 100,000 pairs, else paper]"
)
BY_PRESET = "[default: the preset's]"


@app.callback()
def _commands() -> None:
    """Keeps `fit` a command by name: typer would make a program's only command the program itself."""


@app.command()
def fit(
    features: Annotated[list[Path], typer.Option(metavar="STORE", help="A feature store; may be given several times.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="The run's folder; if it is taken, RUN-2, RUN-3 …  [default: runs/<store>-<head>]"
        ),
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Captions to train on together, as in raw,long.  [default: all in the store]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=PRESETS_HELP)] = None,
    head: Annotated[str, typer.Option(help="linear, mlp, glu; or cca, computed in closed form.")] = "glu",
    expansion: Annotated[int | None, typer.Option(help="Hidden units a feature dimension.  [default: 4]")] = None,
    dim: Annotated[
        int | None, typer.Option(help="Of the shared space.  [default: 1024; 256 from a closed form]")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help=f"On the heads' inputs.  {BY_PRESET}")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="random, or closed-form: a linear path that starts as the CCA.  [default: random]"),
    ] = None,
    ridge: Annotated[float | None, typer.Option(help="Regularisation of the closed form.  [default: 2]")] = None,
    loss: Annotated[str | None, typer.Option(help="sigmoid or infonce.  [default: sigmoid]")] = None,
    divisor: Annotated[
        str | None, typer.Option(help="Of the sigmoid loss: pairs (|B|²) or batch (|B|).  [default: pairs]")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="lion or adamw.  [default: lion]")] = None,
    lr: Annotated[float | None, typer.Option(help=f"Highest rate; falls along a cosine.  {BY_PRESET}")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 1e-7]")] = None,
    warmup: Annotated[float | None, typer.Option(help=f"Fraction of the steps.  {BY_PRESET}")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"{BY_PRESET}")] = None,
    epochs: Annotated[float | None, typer.Option(help=f"{BY_PRESET}")] = None,
    steps: Annotated[int | None, typer.Option(help="In place of epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Fraction of the pairs to score on, not to train on; 100 to 5,000 of them.  [default: 0.05]"),
    ] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Where a store holds several.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train the heads on stores; typed again after a stop, it goes on. The defaults are the paper's, or a preset's."""
    given = {
        "preset": preset,
        "head": head,
        "expansion": expansion,
        "dim": dim,
        "dropout": dropout,
        "start": start,
        "ridge": ridge,
        "loss": loss,
        "divisor": divisor,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "held_out": held_out,
    }
    options = {name: value for name, value in given.items() if value is not None}
    from sail_align.align.settings import check_options

    check_options(options)  # before the seconds that torch takes to load

    from sail_align.align.plan import make_plan
    from sail_align.align.runs import claim_run, default_path
    from sail_align.align.trainer import fit as train
    from sail_align.extract.encoders.runtime import Runtime

    where = Runtime.of(device, "float32").device
    names = captions.split(",") if captions else None
    plan, notes = make_plan(features, options, captions=names, image_encoder=image_encoder, text_encoder=text_encoder)
    for note in notes:
        typer.echo(f"note: {note}")
    run, resumed = claim_run(out or default_path(features, head), plan.record())
    typer.echo(f"{'going on with' if resumed else 'writing'} {run}: {plan.describe()}")
    started = time.monotonic()
    try:
        scores = train(plan, run, device=where, quiet=quiet)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with {run} from its last checkpoint", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"wrote {run} in {time.monotonic() - started:.0f} s")
    if scores:
        recalls = {way: " / ".join(f"{scores[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)) for way in ("t2i", "i2t")}
        typer.echo(
            f"held out ({plan.held_out_rows:,} pairs): loss {scores['loss']:.4g}, "
            f"R@1/5/10 text→image {recalls['t2i']}, image→text {recalls['i2t']}"
        )
    typer.echo(f"Next: sail-eval all --run {run}")


def main() -> None:
    """Entry point."""
    run_command(app)
