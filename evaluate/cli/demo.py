"""sail-eval demo: the whole pipeline on embedded data."""

import typer

from sail_align.extract.errors import command
from sail_align.extract.system.command_line import Device, Quiet, Result, with_json


@with_json
def demo(device: Device = "auto", quiet: Quiet = False) -> Result:
    """Run all three stages on embedded drawings, into features/ and runs/ here. Needs 'sail-align[demo]', no network.

    Rerun the same command to resume after a stop.
    """
    from sail_align.align.cli import app as align
    from sail_align.evaluate.cli.score import evaluate
    from sail_align.evaluate.score import prepare
    from sail_align.extract.cli import app as extract

    options = ["--device", device, *(["--quiet"] if quiet else [])]
    for program, app, words in (
        ("sail-extract", extract, ["run", "demo"]),
        ("sail-align", align, ["fit", "--features", "features/demo.zarr"]),
    ):
        typer.echo(f"$ {command(program, *words)}")
        if code := app([*words, *options], standalone_mode=False):
            raise typer.Exit(code)
    typer.echo("$ sail-eval all")
    return evaluate(prepare(None, None, device=device, quiet=quiet))
