"""sail-align fit: its options and its output."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sail_align.align.cli.options import Features, ImageEncoder, TextEncoder, with_settings
from sail_align.align.fit import FitResult, fit_stores
from sail_align.align.runs.folder import RunFolder
from sail_align.align.train.trackers import parse_trackers
from sail_align.extract.errors import command
from sail_align.extract.system.command_line import Device, Quiet, Result, with_json

_CAPTIONS = """Captions to train on together, with optional weights: raw,long:0.5.  [default: those in all stores; with
--positives, those in any]"""
_EXCLUDE = "Keys to leave out, one per line, as `sail-extract overlap` writes them. Can be repeated."
_OUT = "Folder of the run.  [default: runs/<store>-<head>, with -2, -3 … added if that has other settings]"
_BUDGET = "Time for training, as in 90s, 30m or 2h: as many steps as fit, at most the epochs of the preset."
_TRACK = "Also log to tensorboard, wandb or both (separated by a comma); each needs its extra: 'sail-align[wandb]'."


@with_json
@with_settings()
def fit(
    features: Features,
    captions: Annotated[str | None, typer.Option(help=_CAPTIONS, rich_help_panel="Data")] = None,
    image_encoder: ImageEncoder = None,
    text_encoder: TextEncoder = None,
    exclude: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=_EXCLUDE, rich_help_panel="Data")] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help=_OUT, rich_help_panel="Run")] = None,
    device: Device = "auto",
    budget: Annotated[str | None, typer.Option(metavar="TIME", help=_BUDGET, rich_help_panel="Optimiser")] = None,
    track: Annotated[str | None, typer.Option(help=_TRACK, rich_help_panel="Run")] = None,
    quiet: Quiet = False,
    **given: Any,
) -> Result:
    """Train the heads on feature stores. Rerun the same command to resume after a stop."""
    result = fit_stores(
        features,
        given,
        captions=captions.split(",") if captions else (),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        exclude=exclude or (),
        out=out,
        device=device,
        budget=budget,
        track=parse_trackers(track),
        quiet=quiet,
        say=typer.echo,
    )
    if not result.leads:
        return None
    if result.trained:
        typer.echo(f"wrote {result.run} in {result.seconds:.0f} s")
    following = _next_command(result)
    for line in (*result.lines(), f"Next: {following}"):
        typer.echo(line)
    if "demo" not in result.datasets and not result.features_only:
        own = command("sail-eval", "retrieval", "TEST.yaml", "--run", result.run)
        typer.echo(f"To score on images of yours: sail-extract init TEST, set `task` in TEST.yaml, {own}")
    return {**result.to_dict(), "next": following}


def _next_command(result: FitResult) -> str:
    """Return the command that scores a run. If there is nothing to score it on, return the one that exports it."""
    from sail_align.extract.manifest import find_manifest, packaged_manifests
    from sail_align.extract.sources.demo.source import DemoConfig

    if result.features_only:
        return command("sail-align", "embed", RunFolder(result.run).settings()["stores"][0], "--run", result.run)
    sets = [find_manifest(name) for name in packaged_manifests()]
    here = [about for about, root in sets if about.task and about.is_here(root)]
    if any("demo" in result.datasets or not isinstance(about.source, DemoConfig) for about in here):
        return command("sail-eval", "all", "--run", result.run)
    return command("sail-align", "export", result.run)
